// Command peer runs the Go packages that the Python package is measured
// against: containerd's and BuildKit's layer differs, BuildKit's eStargz
// compressor, and the estargz reader and writer.
package main

import (
	"bufio"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"hash"
	"io"
	"os"
	"runtime/debug"
	"strings"

	"github.com/containerd/log"
)

const usage = `usage: peer COMMAND [FLAGS] ARGUMENTS

  diff         [-lower DIR] [-epoch SECONDS] UPPER OUT.tar
  overlay-diff [-lower DIR ...] UPPERDIR OUT.tar   (topmost lower first)
  blob         -how HOW [FLAGS] SOURCE OUT
               HOW: buildkit, two-blobs (of a directory),
                    lossless, build, build-from-gzip, legacy, external, zstd
                    (of a tar file)
  apply        [-no-same-owner] LAYER... DIR
  read         [-toc FILE] BLOB
  ranges       [-toc FILE] BLOB                    (wanted ranges on the standard input)
  verify       [-toc-digest DIGEST] BLOB
  toc          BLOB
  unpack       BLOB OUT.tar
  tarlist      TAR
  clamp        -epoch SECONDS IN.tar OUT.tar
  output       LINE...                             (of --output)
  judge        KIND                                (inputs on the standard input, each after its size)
  version

OUT.tar may be - for the standard output, TAR - for the standard input.
"peer COMMAND -h" lists a command's flags.
`

var commands = map[string]func([]string) error{
	"diff":         runDiff,
	"overlay-diff": runOverlayDiff,
	"blob":         runBlob,
	"apply":        runApply,
	"read":         runRead,
	"ranges":       runRanges,
	"verify":       runVerify,
	"toc":          runTOC,
	"unpack":       runUnpack,
	"tarlist":      runTarList,
	"clamp":        runClamp,
	"output":       runOutput,
	"judge":        runJudge,
	"version":      runVersion,
}

func main() {
	if len(os.Args) < 2 {
		fmt.Fprint(os.Stderr, usage)
		os.Exit(1)
	}
	log.SetLevel("error") // the content store warns of file systems without fs-verity
	name := os.Args[1]
	run, ok := commands[name]
	if !ok {
		fmt.Fprint(os.Stderr, usage)
		if name == "-h" || name == "-help" || name == "--help" || name == "help" {
			return
		}
		os.Exit(1)
	}
	if err := run(os.Args[2:]); err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintf(os.Stderr, "peer %s: %v\n", name, err)
		os.Exit(1)
	}
}

// newFlags makes a flag set that returns its errors to main.
func newFlags(name string) *flag.FlagSet {
	return flag.NewFlagSet("peer "+name, flag.ContinueOnError)
}

// parse reads the flags and returns exactly n positional arguments.
func parse(fs *flag.FlagSet, args []string, n int) ([]string, error) {
	if err := fs.Parse(args); err != nil {
		return nil, err
	}
	if fs.NArg() != n {
		return nil, fmt.Errorf("want %d arguments, got %d", n, fs.NArg())
	}
	return fs.Args(), nil
}

// repeated is a flag that may be given more than once.
type repeated []string

func (r *repeated) String() string     { return strings.Join(*r, ",") }
func (r *repeated) Set(s string) error { *r = append(*r, s); return nil }

// isSet tells whether a flag was on the command line.
func isSet(fs *flag.FlagSet, name string) (found bool) {
	fs.Visit(func(f *flag.Flag) { found = found || f.Name == name })
	return found
}

// writeTo gives write a buffered writer to the file, or to the standard
// output when the path is "-".
func writeTo(path string, write func(io.Writer) error) error {
	f := os.Stdout
	if path != "-" {
		var err error
		if f, err = os.Create(path); err != nil {
			return err
		}
		defer f.Close()
	}
	w := bufio.NewWriterSize(f, 128<<10)
	if err := write(w); err != nil {
		return err
	}
	if err := w.Flush(); err != nil {
		return err
	}
	return f.Close()
}

// openSection opens a file for random access.
func openSection(path string) (*io.SectionReader, *os.File, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, nil, err
	}
	st, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, nil, err
	}
	return io.NewSectionReader(f, 0, st.Size()), f, nil
}

// hasher counts and digests what is written to it.
type hasher struct {
	sha  hash.Hash
	size int64
}

func newHasher() *hasher { return &hasher{sha: sha256.New()} }

func (h *hasher) Write(p []byte) (int, error) {
	h.size += int64(len(p))
	return h.sha.Write(p)
}

func (h *hasher) digest() string { return fmt.Sprintf("sha256:%x", h.sha.Sum(nil)) }

// printJSON writes one line.
func printJSON(v any) error { return json.NewEncoder(os.Stdout).Encode(v) }

// runVersion prints the versions that are linked into this program.
func runVersion(args []string) error {
	if _, err := parse(newFlags("version"), args, 0); err != nil {
		return err
	}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return errors.New("no build information")
	}
	modules := map[string]string{}
	for _, m := range info.Deps {
		if m.Replace != nil {
			m = m.Replace
		}
		modules[m.Path] = m.Version
	}
	return printJSON(map[string]any{"go": info.GoVersion, "modules": modules})
}
