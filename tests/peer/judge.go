package main

import (
	"bufio"
	_ "crypto/sha512" // of digests
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/containerd/platforms"
	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/containerd/stargz-snapshotter/estargz/externaltoc"
	"github.com/distribution/reference"
	digest "github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// judgements are what "judge" can be asked about an input: what Go makes of it.
var judgements = map[string]func([]byte) (any, error){
	"config":    judgeJSON[ocispec.Image],
	"digest":    judgeDigest,
	"footer":    judgeFooter,
	"index":     judgeJSON[ocispec.Index],
	"manifest":  judgeJSON[ocispec.Manifest],
	"output":    judgeOutput,
	"platform":  judgePlatform,
	"reference": judgeReference,
	"toc":       judgeJSON[estargz.JTOC],
}

// judgement is an answer of "judge".
type judgement struct {
	Error string `json:"error,omitempty"`
	Found any    `json:"found,omitempty"`
}

// runJudge reads inputs, each after its size in four bytes, and prints a JSON object for each at once.
func runJudge(args []string) error {
	pos, err := parse(newFlags("judge"), args, 1)
	if err != nil {
		return err
	}
	judge, ok := judgements[pos[0]]
	if !ok {
		return fmt.Errorf("nothing is known of %q", pos[0])
	}
	lines := json.NewEncoder(os.Stdout)
	for in := bufio.NewReader(os.Stdin); ; {
		var size uint32
		if err := binary.Read(in, binary.BigEndian, &size); err == io.EOF {
			return nil
		} else if err != nil {
			return err
		}
		data := make([]byte, size)
		if _, err := io.ReadFull(in, data); err != nil {
			return err
		}
		if err := lines.Encode(judged(judge, data)); err != nil {
			return err
		}
	}
}

// judged takes a panic for an error: some of Go's parsers have them for input that is short.
func judged(judge func([]byte) (any, error), data []byte) (made judgement) {
	defer func() {
		if cause := recover(); cause != nil {
			made = judgement{Error: fmt.Sprint(cause)}
		}
	}()
	found, err := judge(data)
	if err != nil {
		return judgement{Error: err.Error()}
	}
	return judgement{Found: found}
}

func judgeJSON[T any](data []byte) (any, error) {
	found := new(T)
	return found, json.Unmarshal(data, found)
}

func judgeDigest(data []byte) (any, error) { return digest.Parse(string(data)) }

func judgeOutput(data []byte) (any, error) {
	parsed := &outputLine{Attrs: map[string]string{}}
	return parsed, parsed.parse(string(data))
}

func judgePlatform(data []byte) (any, error) {
	found, err := platforms.Parse(strings.TrimSpace(string(data)))
	return platforms.Normalize(found), err
}

func judgeReference(data []byte) (any, error) {
	named, err := reference.ParseNormalizedNamed(string(data))
	if err != nil {
		return nil, err
	}
	named = reference.TagNameOnly(named)
	found := map[string]string{"host": reference.Domain(named), "repository": reference.Path(named)}
	if tagged, ok := named.(reference.Tagged); ok {
		found["tag"] = tagged.Tag()
	}
	if digested, ok := named.(reference.Digested); ok {
		found["digest"] = digested.Digest().String()
	}
	return found, nil
}

// judgeFooter gives the format, by the size of its footer, and where the TOC is, for the end of a blob.
func judgeFooter(data []byte) (any, error) {
	formats := []estargz.Decompressor{
		new(estargz.GzipDecompressor),
		new(estargz.LegacyGzipDecompressor),
		externaltoc.NewGzipDecompressor(nil),
	}
	err := io.ErrUnexpectedEOF
	for _, format := range formats {
		size := int(format.FooterSize())
		if len(data) < size {
			continue
		}
		var offset int64
		if _, offset, _, err = format.ParseFooter(data[len(data)-size:]); err == nil {
			return map[string]int64{"size": int64(size), "toc_offset": offset}, nil
		}
	}
	return nil, err
}
