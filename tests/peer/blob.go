package main

import (
	"bufio"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/pkg/labels"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/moby/buildkit/util/compression"
	digest "github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
)

// blobJob is what the command line of "blob" asks for.
type blobJob struct {
	how, lower, source, out string
	level                   *int // nil: the maker's default
	chunkSize, minChunkSize int
	prioritized             []string
	allowMissing            bool
	workers                 int
	toc                     string // where the TOC of an external-TOC blob goes
	uncounted               bool   // leave the uncompressed size out where only inflating the blob would tell
}

// blobReport is what "blob" prints; what the maker does not tell is left out.
type blobReport struct {
	Seconds          float64  `json:"seconds"`
	Size             int64    `json:"size,omitempty"`
	Digest           string   `json:"digest,omitempty"`
	DiffID           string   `json:"diff_id,omitempty"`
	TOCDigest        string   `json:"toc_digest,omitempty"`
	UncompressedSize int64    `json:"uncompressed_size,omitempty"`
	GzipSize         int64    `json:"gzip_size,omitempty"`   // two-blobs: the first blob
	GzipDigest       string   `json:"gzip_digest,omitempty"` // two-blobs: the first blob
	Missed           []string `json:"missed,omitempty"`      // with -allow-missing
}

// makers of blobs, each with the flags that it has no use for.
var makers = map[string]struct {
	run     func(*blobJob, *blobReport) error
	refused []string
}{
	"buildkit": {
		makeBuildKit, []string{"chunk-size", "min-chunk-size", "prioritized", "allow-missing", "workers", "toc"},
	},
	"two-blobs":       {makeTwoBlobs, []string{"toc"}},
	"lossless":        {makeLossless, []string{"lower", "prioritized", "allow-missing", "workers", "toc"}},
	"build":           {makeBuild, []string{"lower", "toc"}},
	"build-from-gzip": {makeBuildFromGzip, []string{"lower", "toc"}},
	"legacy":          {makeLegacy, []string{"lower", "prioritized", "allow-missing", "workers", "toc", "min-chunk-size"}},
	"external":        {makeExternal, []string{"lower", "prioritized", "allow-missing", "workers"}},
	"zstd":            {makeZstd, []string{"lower", "prioritized", "allow-missing", "workers", "toc"}},
}

func runBlob(args []string) error {
	j := blobJob{}
	fs := newFlags("blob")
	fs.StringVar(&j.how, "how", "", "buildkit, two-blobs, lossless, build, build-from-gzip, legacy, external or zstd")
	fs.StringVar(&j.lower, "lower", "", "tree to compare with (buildkit, two-blobs)")
	level := fs.Int("level", 0, "gzip level; default -1 for buildkit, else 6 (zstd: 1 to 4, default 2)")
	fs.IntVar(&j.chunkSize, "chunk-size", 0, "chunk size; 0 is the package's default")
	fs.IntVar(&j.minChunkSize, "min-chunk-size", 0, "min chunk size")
	list := fs.String("prioritized", "", "file of prioritized paths, one a line (build, two-blobs)")
	fs.BoolVar(&j.allowMissing, "allow-missing", false, "report prioritized paths that are not there instead of failing")
	fs.IntVar(&j.workers, "workers", 0, "parallel parts of build and two-blobs; 0 is one per CPU")
	fs.StringVar(&j.toc, "toc", "", "file for the TOC that is kept outside the blob (external)")
	fs.BoolVar(&j.uncounted, "uncounted", false, "do not inflate the blob afterwards to count its bytes (lossless)")
	pos, err := parse(fs, args, 2)
	if err != nil {
		return err
	}
	j.source, j.out = pos[0], pos[1]
	if isSet(fs, "level") {
		j.level = level
	}
	if *list != "" {
		text, err := os.ReadFile(*list)
		if err != nil {
			return err
		}
		for line := range strings.Lines(string(text)) {
			if line = strings.TrimRight(line, "\r\n"); line != "" {
				j.prioritized = append(j.prioritized, line)
			}
		}
	}
	maker, ok := makers[j.how]
	if !ok {
		return fmt.Errorf("unknown -how %q", j.how)
	}
	for _, name := range maker.refused {
		if isSet(fs, name) {
			return fmt.Errorf("-how %s takes no -%s", j.how, name)
		}
	}
	var r blobReport
	start := time.Now()
	if err := maker.run(&j, &r); err != nil {
		return err
	}
	r.Seconds = time.Since(start).Seconds()
	// The plain writer does not tell the uncompressed size: count it, off the clock.
	if r.UncompressedSize == 0 && !j.uncounted && j.how != "zstd" && isRegular(j.out) {
		b, err := gunzip(j.out)
		if err != nil {
			return err
		}
		if b.DiffID != r.DiffID {
			return fmt.Errorf("writer says diffID %s, the blob has %s", r.DiffID, b.DiffID)
		}
		r.UncompressedSize = b.UncompressedSize
	}
	return printJSON(r)
}

func (j *blobJob) levelOr(def int) int {
	if j.level != nil {
		return *j.level
	}
	return def
}

func isRegular(path string) bool {
	st, err := os.Stat(path)
	return err == nil && st.Mode().IsRegular()
}

// writeBlob lets write fill the output file and reports its size and digest.
func (j *blobJob) writeBlob(r *blobReport, write func(io.Writer) error) error {
	h := newHasher()
	err := writeTo(j.out, func(w io.Writer) error { return write(io.MultiWriter(w, h)) })
	r.Size, r.Digest = h.size, h.digest()
	return err
}

// makeLossless runs the estargz writer over a tar file.
func makeLossless(j *blobJob, r *blobReport) error {
	return j.appendLossless(r, estargz.NewGzipCompressorWithLevel(j.levelOr(6)))
}

// appendLossless runs the estargz writer over a tar file, in one of its formats.
func (j *blobJob) appendLossless(r *blobReport, format estargz.Compressor) error {
	f, err := os.Open(j.source)
	if err != nil {
		return err
	}
	defer f.Close()
	return j.writeBlob(r, func(out io.Writer) error {
		w := estargz.NewWriterWithCompressor(out, format)
		w.ChunkSize, w.MinChunkSize = j.chunkSize, j.minChunkSize
		if err := w.AppendTarLossLess(bufio.NewReaderSize(f, 128<<10)); err != nil {
			return err
		}
		toc, err := w.Close()
		r.TOCDigest, r.DiffID = toc.String(), w.DiffID()
		return err
	})
}

// makeBuild runs estargz.Build over a tar file, compressed or not.
func makeBuild(j *blobJob, r *blobReport) error {
	sr, f, err := openSection(j.source)
	if err != nil {
		return err
	}
	defer f.Close()
	opts := []estargz.Option{
		estargz.WithCompressionLevel(j.levelOr(6)),
		estargz.WithChunkSize(j.chunkSize),
		estargz.WithMinChunkSize(j.minChunkSize),
		estargz.WithPrioritizedFiles(j.prioritized),
		estargz.WithParallelism(j.workers),
	}
	if j.allowMissing {
		opts = append(opts, estargz.WithAllowPrioritizeNotFound(&r.Missed))
	}
	blob, err := estargz.Build(sr, opts...)
	if err != nil {
		return err
	}
	defer blob.Close()
	if err := j.writeBlob(r, func(out io.Writer) error {
		_, err := io.Copy(out, blob)
		return err
	}); err != nil {
		return err
	}
	r.TOCDigest, r.DiffID = blob.TOCDigest().String(), blob.DiffID().String()
	r.UncompressedSize, err = blob.UncompressedSize()
	return err
}

// makeBuildFromGzip is makeBuild that insists on a gzip source.
func makeBuildFromGzip(j *blobJob, r *blobReport) error {
	f, err := os.Open(j.source)
	if err != nil {
		return err
	}
	zr, err := gzip.NewReader(f)
	f.Close()
	if err != nil {
		return fmt.Errorf("%s: %w", j.source, err)
	}
	zr.Close()
	return makeBuild(j, r)
}

// makeTwoBlobs writes the diff as a gzip blob and then converts that blob,
// as a build followed by an image conversion does.
func makeTwoBlobs(j *blobJob, r *blobReport) error {
	dir, err := j.tempDir()
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	first := filepath.Join(dir, "blob.gz")
	blob, diffID := newHasher(), newHasher()
	if err := writeTo(first, func(w io.Writer) error {
		zw, err := gzip.NewWriterLevel(io.MultiWriter(w, blob), j.levelOr(6))
		if err != nil {
			return err
		}
		if err := writeDiff(context.Background(), io.MultiWriter(zw, diffID), j.lower, j.source); err != nil {
			return err
		}
		return zw.Close()
	}); err != nil {
		return err
	}
	r.GzipSize, r.GzipDigest = blob.size, blob.digest()
	second := *j
	second.source = first
	return makeBuild(&second, r)
}

// makeBuildKit writes the diff through BuildKit's eStargz compressor into a
// content store, in the order of BuildKit's own diff: write, commit, finalize.
func makeBuildKit(j *blobJob, r *blobReport) error {
	dir, err := j.tempDir()
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	ctx := context.Background()
	store, err := local.NewLabeledStore(dir, &memoryLabels{})
	if err != nil {
		return err
	}
	conf := compression.New(compression.EStargz)
	if j.level != nil {
		conf = conf.SetLevel(*j.level)
	}
	compress, finalize := conf.Type.Compress(ctx, conf)
	mediaType := conf.Type.MediaType()
	cw, err := content.OpenWriter(ctx, store, content.WithRef("diff"),
		content.WithDescriptor(ocispecs.Descriptor{MediaType: mediaType}))
	if err != nil {
		return err
	}
	defer cw.Close()
	buf := bufio.NewWriterSize(cw, 128<<10)
	compressed, err := compress(buf, mediaType)
	if err != nil {
		return err
	}
	tarHash := newHasher()
	if err := writeDiff(ctx, io.MultiWriter(compressed, tarHash), j.lower, j.source); err != nil {
		return err
	}
	if err := compressed.Close(); err != nil {
		return err
	}
	if err := buf.Flush(); err != nil {
		return err
	}
	dgst := cw.Digest()
	label := content.WithLabels(map[string]string{labels.LabelUncompressed: tarHash.digest()})
	if err := cw.Commit(ctx, 0, dgst, label); err != nil {
		return err
	}
	notes, err := finalize(ctx, store)
	if err != nil {
		return err
	}
	info, err := store.Info(ctx, dgst)
	if err != nil {
		return err
	}
	r.Size, r.Digest = info.Size, dgst.String()
	r.DiffID = notes[labels.LabelUncompressed]
	r.TOCDigest = notes[estargz.TOCJSONDigestAnnotation]
	r.UncompressedSize, err = strconv.ParseInt(notes[estargz.StoreUncompressedSizeAnnotation], 10, 64)
	if err != nil {
		return err
	}
	if got := info.Labels[labels.LabelUncompressed]; got != r.DiffID {
		return fmt.Errorf("the store's label says %q, the annotation %q", got, r.DiffID)
	}
	return j.takeOut(filepath.Join(dir, "blobs", dgst.Algorithm().String(), dgst.Encoded()))
}

// tempDir makes a directory on the file system of the output when it can.
func (j *blobJob) tempDir() (string, error) {
	if _, err := os.Stat(j.out); err == nil && !isRegular(j.out) {
		return os.MkdirTemp("", "peer-")
	}
	return os.MkdirTemp(filepath.Dir(j.out), ".peer-")
}

// takeOut moves a committed blob to the output, which may be a device.
func (j *blobJob) takeOut(blob string) error {
	if _, err := os.Stat(j.out); err == nil && !isRegular(j.out) {
		f, err := os.Open(blob)
		if err != nil {
			return err
		}
		defer f.Close()
		return writeTo(j.out, func(w io.Writer) error {
			_, err := io.Copy(w, f)
			return err
		})
	}
	return errors.Join(os.Chmod(blob, 0o644), os.Rename(blob, j.out))
}

// memoryLabels keeps the labels of a local content store.
type memoryLabels struct {
	mu     sync.Mutex
	labels map[digest.Digest]map[string]string
}

func (m *memoryLabels) Get(d digest.Digest) (map[string]string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return maps.Clone(m.labels[d]), nil
}

func (m *memoryLabels) Set(d digest.Digest, l map[string]string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.labels == nil {
		m.labels = map[digest.Digest]map[string]string{}
	}
	m.labels[d] = maps.Clone(l)
	return nil
}

// Update sets the given labels; an empty value removes one.
func (m *memoryLabels) Update(d digest.Digest, l map[string]string) (map[string]string, error) {
	all, _ := m.Get(d)
	if all == nil {
		all = map[string]string{}
	}
	maps.Copy(all, l)
	maps.DeleteFunc(all, func(_, value string) bool { return value == "" })
	return maps.Clone(all), m.Set(d, all)
}
