package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/moby/buildkit/util/overlay"
)

// checkDirs rejects what is not a directory: the walking differ would take a
// missing tree for an empty one.
func checkDirs(dirs ...string) error {
	for _, d := range dirs {
		st, err := os.Stat(d)
		if err != nil {
			return err
		}
		if !st.IsDir() {
			return fmt.Errorf("%s is not a directory", d)
		}
	}
	return nil
}

// writeDiff writes containerd's layer tar of the change from lower (empty
// when "") to upper.
func writeDiff(ctx context.Context, w io.Writer, lower, upper string, opts ...archive.WriteDiffOpt) error {
	if err := checkDirs(upper); err != nil {
		return err
	}
	if lower != "" {
		if err := checkDirs(lower); err != nil {
			return err
		}
	}
	return archive.WriteDiff(ctx, w, lower, upper, opts...)
}

func runDiff(args []string) error {
	fs := newFlags("diff")
	lower := fs.String("lower", "", "tree to compare with; none is an empty one")
	epoch := fs.Int64("epoch", 0, "upper bound of modification times, in seconds")
	pos, err := parse(fs, args, 2)
	if err != nil {
		return err
	}
	var opts []archive.WriteDiffOpt
	if isSet(fs, "epoch") {
		t := time.Unix(*epoch, 0).UTC()
		opts = append(opts, archive.WithSourceDateEpoch(&t))
	}
	return writeTo(pos[1], func(w io.Writer) error {
		return writeDiff(context.Background(), w, *lower, pos[0], opts...)
	})
}

func runOverlayDiff(args []string) error {
	fs := newFlags("overlay-diff")
	var lowers repeated
	fs.Var(&lowers, "lower", "lower directory, topmost first; may be repeated")
	pos, err := parse(fs, args, 2)
	if err != nil {
		return err
	}
	upper, err := filepath.Abs(pos[0])
	if err != nil {
		return err
	}
	for i := range lowers {
		if lowers[i], err = filepath.Abs(lowers[i]); err != nil {
			return err
		}
	}
	if err := checkDirs(append([]string{upper}, lowers...)...); err != nil {
		return err
	}
	return writeTo(pos[1], func(w io.Writer) error {
		return overlay.WriteUpperdir(context.Background(), w, upper, lowerMounts(lowers))
	})
}

// lowerMounts gives the mounts that containerd's overlayfs snapshotter gives
// for a read-only view of the lowers.
func lowerMounts(lowers []string) []mount.Mount {
	switch len(lowers) {
	case 0:
		return nil
	case 1:
		return []mount.Mount{{Type: "bind", Source: lowers[0], Options: []string{"ro", "rbind"}}}
	}
	opts := []string{"lowerdir=" + strings.Join(lowers, ":")}
	if _, err := os.Stat("/sys/module/overlay/parameters/index"); err == nil {
		opts = append(opts, "index=off")
	}
	return []mount.Mount{{Type: "overlay", Source: "overlay", Options: opts}}
}
