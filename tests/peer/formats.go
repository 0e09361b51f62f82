package main

import (
	"archive/tar"
	"compress/gzip"
	"encoding/json"
	"fmt"
	"hash"
	"io"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/containerd/stargz-snapshotter/estargz/externaltoc"
	"github.com/containerd/stargz-snapshotter/estargz/zstdchunked"
	"github.com/klauspost/compress/zstd"
	digest "github.com/opencontainers/go-digest"
)

// makeLegacy writes stargz as it was before eStargz.
func makeLegacy(j *blobJob, r *blobReport) error {
	level := j.levelOr(6)
	return j.appendLossless(r, &legacyCompressor{estargz.NewGzipCompressorWithLevel(level), level})
}

// makeExternal writes a blob without its TOC, and the TOC's member into a file of its own.
func makeExternal(j *blobJob, r *blobReport) error {
	format := externaltoc.NewGzipCompressorWithLevel(j.levelOr(6))
	if err := j.appendLossless(r, format); err != nil || j.toc == "" {
		return err
	}
	return writeTo(j.toc, func(w io.Writer) error {
		_, err := format.WriteTOCTo(w)
		return err
	})
}

// makeZstd writes stargz-snapshotter's kind of zstd:chunked.
func makeZstd(j *blobJob, r *blobReport) error {
	level := zstd.EncoderLevel(j.levelOr(int(zstd.SpeedDefault)))
	return j.appendLossless(r, &zstdchunked.Compressor{CompressionLevel: level})
}

// legacyCompressor ends blobs as CRFS did: chunks have no digests, every entry
// has its "NumLink", the TOC's member an extra field, and the footer 47 bytes.
type legacyCompressor struct {
	*estargz.GzipCompressor
	level int
}

func (c *legacyCompressor) WriteTOCAndFooter(
	w io.Writer, off int64, toc *estargz.JTOC, diffHash hash.Hash,
) (digest.Digest, error) {
	text, err := legacyTOC(toc)
	if err != nil {
		return "", err
	}
	zw, err := gzip.NewWriterLevel(w, c.level)
	if err != nil {
		return "", err
	}
	zw.Extra = []byte("stargz.toc")
	tw := tar.NewWriter(io.MultiWriter(zw, diffHash))
	header := tar.Header{Typeflag: tar.TypeReg, Name: estargz.TOCTarName, Size: int64(len(text))}
	if err := tw.WriteHeader(&header); err != nil {
		return "", err
	}
	if _, err := tw.Write(text); err != nil {
		return "", err
	}
	if err := tw.Close(); err != nil {
		return "", err
	}
	if err := zw.Close(); err != nil {
		return "", err
	}
	// The extra field has no subfield header, which makes the footer four bytes shorter.
	_, err = w.Write(estargz.CreateGzipFooter(fmt.Appendf(nil, "%016xSTARGZ", off)))
	return digest.FromBytes(text), err
}

func legacyTOC(toc *estargz.JTOC) ([]byte, error) {
	type entry struct {
		*estargz.TOCEntry
		NumLink int // CRFS stored it, always as 0
	}
	entries := make([]entry, len(toc.Entries))
	for i, e := range toc.Entries {
		e.ChunkDigest = ""
		entries[i] = entry{TOCEntry: e}
	}
	return json.MarshalIndent(struct {
		Version int     `json:"version"`
		Entries []entry `json:"entries"`
	}{toc.Version, entries}, "", "\t")
}
