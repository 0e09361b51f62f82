// Command stargz does with a layer in a registry what the stargz snapshotter
// does, through its own code: resolve, verify, prefetch, and serve files
// through its FUSE nodes, which need no mount for that. It prints which ranges
// of the blob each step asked for.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"net/http"
	"os"
	"path"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/pkg/reference"
	"github.com/containerd/log"
	"github.com/containerd/stargz-snapshotter/fs/config"
	"github.com/containerd/stargz-snapshotter/fs/layer"
	"github.com/containerd/stargz-snapshotter/metadata/memory"
	"github.com/containerd/stargz-snapshotter/task"
	fusefs "github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	digest "github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
)

// span is a half-open range of a blob's bytes.
type span [2]int64

// report is what is printed: the ranges that each step asked the registry
// for, in the order of the requests.
type report struct {
	Size         int64  `json:"size"`
	TOCDigest    string `json:"toc_digest"`
	Resolve      []span `json:"resolve"` // to find the blob, its footer and its TOC
	Prefetch     []span `json:"prefetch"`
	PrefetchSize int64  `json:"prefetch_size"` // what the layer says it prefetched
	Files        []file `json:"files"`
}

type file struct {
	Path   string `json:"path"`
	Size   int    `json:"size"`
	Digest string `json:"digest"`
	Ranges []span `json:"ranges"`
}

// job is what the command line asks for.
type job struct {
	ref, blob, toc string
	prefetchSize   int64
	noPrefetch     bool
	unit           int64
	paths          []string
}

func main() {
	log.SetLevel("error")
	j := job{}
	flag.StringVar(&j.ref, "ref", "", "HOST/REPOSITORY:TAG, spoken to by plain HTTP")
	flag.StringVar(&j.blob, "layer", "", "digest of the layer's blob")
	flag.StringVar(&j.toc, "toc-digest", "", "digest that the TOC must have")
	flag.Int64Var(&j.prefetchSize, "prefetch-size", 0, "bytes to prefetch of a layer without landmarks")
	flag.BoolVar(&j.noPrefetch, "no-prefetch", false, "leave prefetching out")
	flag.Int64Var(&j.unit, "unit", 0, "fetch multiples of this many bytes; 0 is the snapshotter's default")
	flag.Func("read", "path of a file to read after prefetching; may be repeated", func(name string) error {
		j.paths = append(j.paths, name)
		return nil
	})
	flag.Parse()
	r, err := j.run()
	if err == nil {
		err = json.NewEncoder(os.Stdout).Encode(r)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "stargz:", err)
		os.Exit(1)
	}
}

func (j *job) run() (*report, error) {
	if flag.NArg() != 0 {
		return nil, fmt.Errorf("want no arguments, got %d", flag.NArg())
	}
	requests := &recorder{inner: &http.Transport{}}
	l, err := j.resolve(requests)
	if err != nil {
		return nil, err
	}
	defer l.Done()
	if err := l.Verify(digest.Digest(j.toc)); err != nil {
		return nil, err
	}
	root, err := l.RootNode(0)
	if err != nil {
		return nil, err
	}
	info := l.Info()
	r := &report{Size: info.Size, TOCDigest: info.TOCDigest.String(), Resolve: requests.take(), Files: []file{}}
	if !j.noPrefetch {
		if err := l.Prefetch(j.prefetchSize); err != nil {
			return nil, err
		}
	}
	r.Prefetch, r.PrefetchSize = requests.take(), l.Info().PrefetchSize
	served := fusefs.NewNodeFS(root, &fusefs.Options{})
	for _, name := range j.paths {
		data, err := read(served, name)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		r.Files = append(r.Files, file{name, len(data), digest.FromBytes(data).String(), requests.take()})
	}
	return r, requests.err
}

// resolve opens the layer; all its caches are in memory.
func (j *job) resolve(requests http.RoundTripper) (layer.Layer, error) {
	spec, err := reference.Parse(j.ref)
	if err != nil {
		return nil, err
	}
	hosts := func(spec reference.Spec) ([]docker.RegistryHost, error) {
		return []docker.RegistryHost{{
			Client:       &http.Client{Transport: requests},
			Host:         spec.Hostname(),
			Scheme:       "http",
			Path:         "/v2",
			Capabilities: docker.HostCapabilityPull | docker.HostCapabilityResolve,
		}}, nil
	}
	dir, err := os.MkdirTemp("", "stargz-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	settings := config.Config{
		HTTPCacheType: "memory",
		FSCacheType:   "memory",
		BlobConfig:    config.BlobConfig{ChunkSize: j.unit},
	}
	tasks := task.NewBackgroundTaskManager(1, time.Second)
	resolver, err := layer.NewResolver(dir, tasks, settings, nil, memory.NewReader, layer.OverlayOpaqueTrusted, nil)
	if err != nil {
		return nil, err
	}
	return resolver.Resolve(context.Background(), hosts, spec, ocispecs.Descriptor{Digest: digest.Digest(j.blob)})
}

// read reads a file as the kernel would: one lookup for each part of its path, open, reads.
func read(served fuse.RawFileSystem, name string) ([]byte, error) {
	at := fuse.InHeader{NodeId: fuse.FUSE_ROOT_ID}
	var found fuse.EntryOut
	for part := range strings.SplitSeq(strings.TrimPrefix(path.Clean("/"+name), "/"), "/") {
		if status := served.Lookup(nil, &at, part, &found); !status.Ok() {
			return nil, fmt.Errorf("lookup of %s: %v", part, status)
		}
		at.NodeId = found.NodeId
	}
	var opened fuse.OpenOut
	if status := served.Open(nil, &fuse.OpenIn{InHeader: at}, &opened); !status.Ok() {
		return nil, fmt.Errorf("open: %v", status)
	}
	data, buf := []byte{}, make([]byte, 128<<10)
	for uint64(len(data)) < found.Size {
		in := fuse.ReadIn{InHeader: at, Fh: opened.Fh, Offset: uint64(len(data)), Size: uint32(len(buf))}
		result, status := served.Read(nil, &in, buf)
		if !status.Ok() {
			return nil, fmt.Errorf("read at %d: %v", len(data), status)
		}
		part, status := result.Bytes(buf)
		if !status.Ok() || len(part) == 0 {
			return nil, fmt.Errorf("read at %d of %d: %d bytes, %v", len(data), found.Size, len(part), status)
		}
		data = append(data, part...)
		result.Done()
	}
	return data, nil
}

// recorder notes the ranges of all requests that pass through it.
type recorder struct {
	inner http.RoundTripper
	mu    sync.Mutex
	spans []span
	err   error // of a request that does not say how much it wants
}

var oneRange = regexp.MustCompile(`^(\d+)-(\d+)$`)

func (r *recorder) RoundTrip(request *http.Request) (*http.Response, error) {
	if request.Method == http.MethodGet {
		r.note(request.Header.Get("Range"))
	}
	return r.inner.RoundTrip(request)
}

func (r *recorder) note(header string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	list, _ := strings.CutPrefix(header, "bytes=")
	for one := range strings.SplitSeq(list, ",") {
		numbers := oneRange.FindStringSubmatch(strings.TrimSpace(one))
		if numbers == nil {
			r.err = fmt.Errorf("a request has %q for its range", header)
			return
		}
		first, err := strconv.ParseInt(numbers[1], 10, 64)
		last, err2 := strconv.ParseInt(numbers[2], 10, 64)
		r.err = errors.Join(r.err, err, err2)
		r.spans = append(r.spans, span{first, last + 1})
	}
}

// take returns what was noted since the last call.
func (r *recorder) take() []span {
	r.mu.Lock()
	defer r.mu.Unlock()
	taken := append([]span{}, r.spans...)
	r.spans = nil
	return taken
}
