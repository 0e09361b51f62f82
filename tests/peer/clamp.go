package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/moby/buildkit/util/compression"
	"github.com/moby/buildkit/util/converter"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
)

// runClamp has BuildKit convert a tar as "rewrite-timestamp" does for layers.
func runClamp(args []string) error {
	fs := newFlags("clamp")
	epoch := fs.Int64("epoch", 0, "upper bound of all times, in seconds")
	pos, err := parse(fs, args, 2)
	if err != nil {
		return err
	}
	job := blobJob{source: pos[0], out: pos[1]}
	dir, err := job.tempDir()
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	ctx := context.Background()
	store, err := local.NewLabeledStore(dir, &memoryLabels{})
	if err != nil {
		return err
	}
	layer, err := storeLayer(ctx, store, job.source)
	if err != nil {
		return err
	}
	target := time.Unix(*epoch, 0)
	convert, err := converter.NewWithRewriteTimestamp(
		ctx, store, layer, compression.New(compression.Uncompressed), &target, nil)
	if err != nil {
		return err
	}
	if convert == nil {
		return errors.New("the converter has nothing to do")
	}
	made, err := convert(ctx, store, layer)
	if err != nil {
		return err
	}
	return job.takeOut(filepath.Join(dir, "blobs", made.Digest.Algorithm().String(), made.Digest.Encoded()))
}

// storeLayer puts a tar into a content store, as an uncompressed layer.
func storeLayer(ctx context.Context, store content.Store, path string) (layer ocispecs.Descriptor, err error) {
	sr, f, err := openSection(path)
	if err != nil {
		return layer, err
	}
	defer f.Close()
	cw, err := content.OpenWriter(ctx, store, content.WithRef("layer"))
	if err != nil {
		return layer, err
	}
	defer cw.Close()
	if err := content.Copy(ctx, cw, sr, sr.Size(), ""); err != nil {
		return layer, fmt.Errorf("%s: %w", path, err)
	}
	return ocispecs.Descriptor{MediaType: ocispecs.MediaTypeImageLayer, Digest: cw.Digest(), Size: sr.Size()}, nil
}
