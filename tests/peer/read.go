package main

import (
	"archive/tar"
	"bufio"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"
	"time"

	"github.com/containerd/stargz-snapshotter/estargz"
	digest "github.com/opencontainers/go-digest"
)

// openTOC gives the stored TOC JSON of a blob.
func openTOC(sr *io.SectionReader) (io.ReadCloser, error) {
	off, footer, err := estargz.OpenFooter(sr)
	if err != nil {
		return nil, err
	}
	return new(estargz.GzipDecompressor).DecompressTOC(io.NewSectionReader(sr, off, sr.Size()-off-footer))
}

func runTOC(args []string) error {
	pos, err := parse(newFlags("toc"), args, 1)
	if err != nil {
		return err
	}
	sr, f, err := openSection(pos[0])
	if err != nil {
		return err
	}
	defer f.Close()
	toc, err := openTOC(sr)
	if err != nil {
		return err
	}
	defer toc.Close()
	_, err = io.Copy(os.Stdout, toc)
	return err
}

func runUnpack(args []string) error {
	pos, err := parse(newFlags("unpack"), args, 2)
	if err != nil {
		return err
	}
	sr, f, err := openSection(pos[0])
	if err != nil {
		return err
	}
	defer f.Close()
	r, err := estargz.Unpack(sr, new(estargz.GzipDecompressor))
	if err != nil {
		return err
	}
	defer r.Close()
	return writeTo(pos[1], func(w io.Writer) error {
		_, err := io.Copy(w, r)
		return err
	})
}

// gunzip reads a whole blob as gzip, which checks every member's CRC, and
// measures both sides.
func gunzip(blob string) (r blobReport, err error) {
	f, err := os.Open(blob)
	if err != nil {
		return r, err
	}
	defer f.Close()
	in, out := newHasher(), newHasher()
	zr, err := gzip.NewReader(bufio.NewReaderSize(io.TeeReader(f, in), 128<<10))
	if err != nil {
		return r, err
	}
	if _, err := io.Copy(out, zr); err != nil {
		return r, err
	}
	return blobReport{Size: in.size, Digest: in.digest(), DiffID: out.digest(), UncompressedSize: out.size}, nil
}

func runVerify(args []string) error {
	fs := newFlags("verify")
	want := fs.String("toc-digest", "", "digest that the TOC must have")
	pos, err := parse(fs, args, 1)
	if err != nil {
		return err
	}
	sr, f, err := openSection(pos[0])
	if err != nil {
		return err
	}
	defer f.Close()
	r, err := estargz.Open(sr)
	if err != nil {
		return err
	}
	// The reader keeps its entries to itself, so take them from the TOC once more.
	stored, err := openTOC(sr)
	if err != nil {
		return err
	}
	raw, err := io.ReadAll(stored)
	if err != nil {
		return err
	}
	var toc estargz.JTOC
	if err := json.Unmarshal(raw, &toc); err != nil {
		return err
	}
	if err := checkTOC(r, &toc, raw, *want); err != nil {
		return err
	}
	v := verifier{r: r, blob: sr}
	if err := v.checkFiles(toc.Entries); err != nil {
		return err
	}
	whole, err := gunzip(pos[0])
	if err != nil {
		return err
	}
	return printJSON(map[string]any{
		"entries":           len(toc.Entries),
		"files":             v.files,
		"chunks":            v.chunks,
		"shadowed":          v.shadowed,
		"toc_digest":        r.TOCDigest(),
		"size":              whole.Size,
		"digest":            whole.Digest,
		"diff_id":           whole.DiffID,
		"uncompressed_size": whole.UncompressedSize,
	})
}

// checkTOC checks the TOC's digest, and its structure where the package can:
// VerifyTOC refuses every blob in which entries share a gzip member.
func checkTOC(r *estargz.Reader, toc *estargz.JTOC, raw []byte, want string) error {
	if got := digest.FromBytes(raw); got != r.TOCDigest() {
		return fmt.Errorf("the stored TOC has digest %s, the reader saw %s", got, r.TOCDigest())
	}
	if want == "" {
		want = r.TOCDigest().String()
	}
	for _, e := range toc.Entries {
		if e.InnerOffset != 0 {
			if got := r.TOCDigest().String(); got != want {
				return fmt.Errorf("TOC digest is %s, want %s", got, want)
			}
			return nil
		}
	}
	_, err := r.VerifyTOC(digest.Digest(want))
	return err
}

// verifier reads file contents and compares them with the TOC's digests.
type verifier struct {
	r                       *estargz.Reader
	blob                    *io.SectionReader
	buf                     []byte
	files, chunks, shadowed int
}

// checkFiles goes through all regular files. A name that occurs again later
// is out of the Reader's reach, so such a file is read at its TOC offset.
func (v *verifier) checkFiles(entries []*estargz.TOCEntry) error {
	last := map[string]int{}
	for i, e := range entries {
		if e.Type != "chunk" {
			last[cleanName(e.Name)] = i
		}
	}
	for i := 0; i < len(entries); {
		e, end := entries[i], i+1
		for end < len(entries) && entries[end].Type == "chunk" {
			end++
		}
		if e.Type == "reg" {
			if err := v.checkFile(entries[i:end], last[cleanName(e.Name)] != i); err != nil {
				return fmt.Errorf("%q: %w", e.Name, err)
			}
		} else if end > i+1 {
			return fmt.Errorf("%q: a chunk follows an entry of type %s", e.Name, e.Type)
		}
		i = end
	}
	return nil
}

// checkFile checks one file: its reg entry and the chunk entries after it.
func (v *verifier) checkFile(parts []*estargz.TOCEntry, shadowed bool) error {
	reg := parts[0]
	v.files++
	var readAt func(*estargz.TOCEntry, []byte) error
	if shadowed {
		v.shadowed++
		readAt = v.readMember
	} else {
		file, err := v.r.OpenFile(reg.Name)
		if err != nil {
			return err
		}
		if file.Size() != reg.Size {
			return fmt.Errorf("the reader says size %d, the TOC %d", file.Size(), reg.Size)
		}
		readAt = func(e *estargz.TOCEntry, p []byte) error {
			n, err := file.ReadAt(p, e.ChunkOffset)
			if n == len(p) {
				return nil
			}
			return err
		}
	}
	whole := digest.Canonical.Digester()
	var pos int64
	for _, e := range parts {
		if reg.Size == 0 && len(parts) == 1 {
			break
		}
		size := e.ChunkSize
		if size == 0 {
			size = reg.Size - e.ChunkOffset
		}
		if e.ChunkOffset != pos || size <= 0 || size > reg.Size-pos {
			return fmt.Errorf("chunk at %d of %d bytes, after %d of %d bytes", e.ChunkOffset, size, pos, reg.Size)
		}
		if int64(cap(v.buf)) < size {
			v.buf = make([]byte, size)
		}
		p := v.buf[:size]
		if err := readAt(e, p); err != nil {
			return fmt.Errorf("chunk at %d: %w", pos, err)
		}
		if got := digest.FromBytes(p); got.String() != e.ChunkDigest {
			return fmt.Errorf("chunk at %d has digest %s, want %q", pos, got, e.ChunkDigest)
		}
		whole.Hash().Write(p)
		pos += size
		v.chunks++
	}
	if pos != reg.Size {
		return fmt.Errorf("chunks hold %d bytes of %d", pos, reg.Size)
	}
	if got := whole.Digest(); got.String() != reg.Digest {
		return fmt.Errorf("file has digest %s, want %q", got, reg.Digest)
	}
	return nil
}

// readMember reads a chunk from the gzip member at its offset.
func (v *verifier) readMember(e *estargz.TOCEntry, p []byte) error {
	zr, err := gzip.NewReader(io.NewSectionReader(v.blob, e.Offset, v.blob.Size()-e.Offset))
	if err != nil {
		return err
	}
	defer zr.Close()
	if _, err := io.CopyN(io.Discard, zr, e.InnerOffset); err != nil {
		return err
	}
	_, err = io.ReadFull(zr, p)
	return err
}

// cleanName makes a tar name relative to the root.
func cleanName(name string) string { return strings.TrimPrefix(path.Clean("/"+name), "/") }

// tarEntry is a line of "tarlist"; byte strings are printed in base64.
type tarEntry struct {
	Name     []byte            `json:"name"`
	Type     string            `json:"type"`
	Linkname []byte            `json:"linkname,omitempty"`
	Size     int64             `json:"size"`
	Mode     int64             `json:"mode"`
	UID      int               `json:"uid"`
	GID      int               `json:"gid"`
	Uname    string            `json:"uname,omitempty"`
	Gname    string            `json:"gname,omitempty"`
	ModTime  int64             `json:"modtime"` // whole seconds, rounded down
	Nanos    int               `json:"modtime_nanos,omitempty"`
	Access   string            `json:"accesstime,omitempty"` // seconds and nanoseconds
	Change   string            `json:"changetime,omitempty"`
	DevMajor int64             `json:"devmajor,omitempty"`
	DevMinor int64             `json:"devminor,omitempty"`
	Xattrs   map[string][]byte `json:"xattrs,omitempty"`
	Records  map[string][]byte `json:"records,omitempty"` // the other PAX records
	Digest   string            `json:"digest,omitempty"`  // of a regular file's contents
	Format   string            `json:"format"`
}

// timeText is empty for a time that is not there.
func timeText(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return fmt.Sprintf("%d.%09d", t.Unix(), t.Nanosecond())
}

func runTarList(args []string) error {
	pos, err := parse(newFlags("tarlist"), args, 1)
	if err != nil {
		return err
	}
	in := os.Stdin
	if pos[0] != "-" {
		if in, err = os.Open(pos[0]); err != nil {
			return err
		}
		defer in.Close()
	}
	return writeTo("-", func(w io.Writer) error {
		lines := json.NewEncoder(w)
		return eachEntry(bufio.NewReaderSize(in, 128<<10), func(e *tarEntry) error { return lines.Encode(e) })
	})
}

// eachEntry reads a tar to its end.
func eachEntry(in io.Reader, use func(*tarEntry) error) error {
	for tr := tar.NewReader(in); ; {
		h, err := tr.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil && !errors.Is(err, tar.ErrInsecurePath) {
			return err
		}
		e := &tarEntry{
			Name: []byte(h.Name), Type: string(h.Typeflag), Linkname: []byte(h.Linkname),
			Size: h.Size, Mode: h.Mode, UID: h.Uid, GID: h.Gid, Uname: h.Uname, Gname: h.Gname,
			ModTime: h.ModTime.Unix(), Nanos: h.ModTime.Nanosecond(),
			Access: timeText(h.AccessTime), Change: timeText(h.ChangeTime),
			DevMajor: h.Devmajor, DevMinor: h.Devminor, Format: h.Format.String(),
		}
		for key, value := range h.PAXRecords {
			if name, ok := strings.CutPrefix(key, "SCHILY.xattr."); ok {
				if e.Xattrs == nil {
					e.Xattrs = map[string][]byte{}
				}
				e.Xattrs[name] = []byte(value)
			} else {
				if e.Records == nil {
					e.Records = map[string][]byte{}
				}
				e.Records[key] = []byte(value)
			}
		}
		if h.Typeflag == tar.TypeReg {
			sum := newHasher()
			if _, err := io.Copy(sum, tr); err != nil {
				return err
			}
			e.Digest = sum.digest()
		}
		if err := use(e); err != nil {
			return err
		}
	}
}
