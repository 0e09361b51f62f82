package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/containerd/containerd/v2/pkg/archive/compression"
)

// runApply applies layers to a directory, the lowest first. As in containerd,
// gzip is inflated by igzip or unpigz where one is installed
// (CONTAINERD_DISABLE_IGZIP and CONTAINERD_DISABLE_PIGZ, set to 1, forbid it),
// and the tar is digested while it is read.
func runApply(args []string) error {
	fs := newFlags("apply")
	noSameOwner := fs.Bool("no-same-owner", false, "leave the owner to the one who runs this")
	if err := fs.Parse(args); err != nil {
		return err
	}
	if fs.NArg() < 2 {
		return fmt.Errorf("want layers and a directory, got %d arguments", fs.NArg())
	}
	layers, dir := fs.Args()[:fs.NArg()-1], fs.Arg(fs.NArg()-1)
	if err := checkDirs(dir); err != nil {
		return err
	}
	var opts []archive.ApplyOpt
	if *noSameOwner {
		opts = append(opts, archive.WithNoSameOwner())
	}
	var size int64
	diffIDs := []string{}
	start := time.Now()
	for _, layer := range layers {
		tar, err := applyLayer(dir, layer, opts)
		if err != nil {
			return fmt.Errorf("%s: %w", layer, err)
		}
		size += tar.size
		diffIDs = append(diffIDs, tar.digest())
	}
	return printJSON(map[string]any{
		"seconds":  time.Since(start).Seconds(),
		"bytes":    size, // of all the tars
		"diff_ids": diffIDs,
	})
}

// applyLayer applies one layer, whichever way it is compressed, and measures its tar.
func applyLayer(dir, layer string, opts []archive.ApplyOpt) (*hasher, error) {
	f, err := os.Open(layer)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	stream, err := compression.DecompressStream(f)
	if err != nil {
		return nil, err
	}
	defer stream.Close()
	tar := newHasher()
	r := io.TeeReader(stream, tar)
	if _, err := archive.Apply(context.Background(), dir, r, opts...); err != nil {
		return nil, err
	}
	_, err = io.Copy(io.Discard, r) // what follows the tar's end counts too
	return tar, err
}
