package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"slices"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/containerd/stargz-snapshotter/estargz/externaltoc"
	"github.com/containerd/stargz-snapshotter/estargz/zstdchunked"
	digest "github.com/opencontainers/go-digest"
)

// maxRead bounds what is read of a file at once.
const maxRead = 64 << 20

// served is a line of "read": an entry of the TOC, with what the Reader makes
// of it; for a hard link, with what the Reader serves in its place.
type served struct {
	Name     string            `json:"name"` // cleaned
	Type     string            `json:"type"` // as the TOC states it
	LinkName string            `json:"link_name,omitempty"`
	Target   string            `json:"target,omitempty"`   // hardlink: name of the entry that is served
	Implicit bool              `json:"implicit,omitempty"` // the TOC has no entry of this directory
	Hidden   bool              `json:"hidden,omitempty"`   // a later entry has the same name; nothing below is known then
	Size     int64             `json:"size"`
	Mode     int64             `json:"mode"`
	UID      int               `json:"uid"`
	GID      int               `json:"gid"`
	Uname    string            `json:"user_name"`
	Gname    string            `json:"group_name"`
	ModTime  int64             `json:"modtime"` // seconds since the epoch
	DevMajor int               `json:"dev_major"`
	DevMinor int               `json:"dev_minor"`
	NumLink  int               `json:"num_link"`
	Xattrs   map[string][]byte `json:"xattrs"`
	Children []string          `json:"children,omitempty"` // base names, sorted
	Digest   string            `json:"digest,omitempty"`   // of the content of a regular file
	Chunks   []servedChunk     `json:"chunks,omitempty"`
	Error    string            `json:"error,omitempty"` // why the content cannot be read
}

// servedChunk is a part of a file. offset to next_offset are bytes of the blob, the rest bytes of the file.
type servedChunk struct {
	Offset      int64  `json:"offset"`
	NextOffset  int64  `json:"next_offset"`
	InnerOffset int64  `json:"inner_offset"`
	ChunkOffset int64  `json:"chunk_offset"`
	Size        int64  `json:"size"`
	Digest      string `json:"digest"` // of the bytes that are there
	Stated      string `json:"stated"` // the TOC's digest of the chunk
}

// shelf serves the files of an open blob.
type shelf struct {
	*estargz.Reader
	toc  *estargz.JTOC // as stored
	file *os.File
	buf  []byte
}

// openShelf opens a blob of any format; external is the file that holds its TOC, if it has none inside.
func openShelf(blob, external string) (*shelf, error) {
	sr, f, err := openSection(blob)
	if err != nil {
		return nil, err
	}
	s, err := newShelf(sr, external)
	if err != nil {
		f.Close()
		return nil, err
	}
	s.file = f
	return s, nil
}

func newShelf(sr *io.SectionReader, external string) (*shelf, error) {
	formats := []estargz.Decompressor{new(zstdchunked.Decompressor)}
	if external != "" {
		read := func() ([]byte, error) { return os.ReadFile(external) }
		formats = append(formats, externaltoc.NewGzipDecompressor(read))
	}
	r, err := estargz.Open(sr, estargz.WithDecompressors(formats...))
	if err != nil {
		return nil, err
	}
	// The reader keeps the order of its entries to itself: take it from the TOC once more.
	toc, err := storedTOC(sr, append(formats, new(estargz.GzipDecompressor), new(estargz.LegacyGzipDecompressor)))
	if err != nil {
		return nil, err
	}
	return &shelf{Reader: r, toc: toc}, nil
}

func (s *shelf) Close() error { return s.file.Close() }

// storedTOC decodes the TOC by the first format whose footer is there.
func storedTOC(sr *io.SectionReader, formats []estargz.Decompressor) (*estargz.JTOC, error) {
	for _, format := range formats {
		footer := make([]byte, min(format.FooterSize(), sr.Size()))
		if _, err := sr.ReadAt(footer, sr.Size()-int64(len(footer))); err != nil {
			return nil, err
		}
		_, offset, size, err := format.ParseFooter(footer)
		if err != nil {
			continue
		}
		var stored io.Reader // none when the TOC is elsewhere
		if offset >= 0 {
			if size <= 0 {
				size = sr.Size() - offset - int64(len(footer))
			}
			stored = io.NewSectionReader(sr, offset, size)
		}
		toc, _, err := format.ParseTOC(stored)
		return toc, err
	}
	return nil, errors.New("no footer that is known")
}

// runRead prints every entry as the Reader serves it: those of the TOC in its
// order, then the directories that only paths imply, sorted.
func runRead(args []string) error {
	fs := newFlags("read")
	external := fs.String("toc", "", "file with the TOC of a blob that has none inside")
	pos, err := parse(fs, args, 1)
	if err != nil {
		return err
	}
	s, err := openShelf(pos[0], *external)
	if err != nil {
		return err
	}
	defer s.Close()
	return writeTo("-", func(w io.Writer) error {
		lines := json.NewEncoder(w)
		for e := range s.entries {
			if err := lines.Encode(e); err != nil {
				return err
			}
		}
		return nil
	})
}

// entries yields the lines of "read".
func (s *shelf) entries(yield func(*served) bool) {
	last := map[string]int{}
	for i, e := range s.toc.Entries {
		if e.Type != "chunk" {
			last[cleanName(e.Name)] = i
		}
	}
	for i, e := range s.toc.Entries {
		if e.Type == "chunk" {
			continue
		}
		line := &served{Name: cleanName(e.Name), Type: e.Type, LinkName: e.LinkName}
		if last[line.Name] == i {
			s.fill(line)
		} else {
			line.Hidden = true
		}
		if !yield(line) {
			return
		}
	}
	for _, name := range s.implied(last) {
		line := &served{Name: name, Type: "dir", Implicit: true}
		s.fill(line)
		if !yield(line) {
			return
		}
	}
}

// implied gives the names of the directories above the entries that have no entry themselves.
func (s *shelf) implied(stated map[string]int) []string {
	var found []string
	seen := map[string]bool{}
	for name := range stated {
		for name != "" {
			name = cleanName(path.Dir(name))
			if _, ok := stated[name]; ok || seen[name] {
				continue
			}
			seen[name] = true
			found = append(found, name)
		}
	}
	slices.Sort(found)
	return found
}

// fill asks the Reader for an entry's attributes and content.
func (s *shelf) fill(line *served) {
	e, ok := s.Lookup(line.Name)
	if !ok {
		line.Error = "not found"
		return
	}
	if line.Type == "hardlink" {
		line.Target = e.Name
	}
	line.Size, line.Mode, line.UID, line.GID = e.Size, e.Mode, e.UID, e.GID
	line.Uname, line.Gname, line.ModTime = e.Uname, e.Gname, e.ModTime().Unix()
	if e.ModTime3339 == "" {
		line.ModTime = 0 // Go's zero time is that of the year 1
	}
	line.DevMajor, line.DevMinor, line.NumLink, line.Xattrs = e.DevMajor, e.DevMinor, e.NumLink, e.Xattrs
	e.ForeachChild(func(name string, _ *estargz.TOCEntry) bool {
		line.Children = append(line.Children, name)
		return true
	})
	slices.Sort(line.Children)
	if e.Type != "reg" {
		return
	}
	if err := s.read(line, e); err != nil {
		line.Error = err.Error()
	}
}

// read reads a file twice, in large pieces and chunk by chunk.
func (s *shelf) read(line *served, e *estargz.TOCEntry) error {
	file, err := s.OpenFile(line.Name)
	if err != nil {
		return err
	}
	if file.Size() != e.Size {
		return fmt.Errorf("opened, it has %d bytes of %d", file.Size(), e.Size)
	}
	whole := digest.Canonical.Digester()
	for off := int64(0); off < e.Size; off += maxRead {
		p, err := s.readAt(file, off, min(maxRead, e.Size-off))
		if err != nil {
			return err
		}
		whole.Hash().Write(p)
	}
	line.Digest = whole.Digest().String()
	for off := int64(0); off < e.Size; {
		c, ok := s.ChunkEntryForOffset(e.Name, off)
		if !ok || c.ChunkOffset != off || c.ChunkSize <= 0 {
			return fmt.Errorf("no chunk at %d", off)
		}
		p, err := s.readAt(file, off, c.ChunkSize)
		if err != nil {
			return err
		}
		line.Chunks = append(line.Chunks, servedChunk{
			c.Offset, c.NextOffset(), c.InnerOffset, c.ChunkOffset, c.ChunkSize, digest.FromBytes(p).String(), c.ChunkDigest,
		})
		off += c.ChunkSize
	}
	return nil
}

// readAt reads exactly size bytes, into a buffer that the next call uses again.
func (s *shelf) readAt(file io.ReaderAt, off, size int64) ([]byte, error) {
	if int64(len(s.buf)) < size {
		s.buf = make([]byte, size)
	}
	n, err := file.ReadAt(s.buf[:size], off)
	if int64(n) < size {
		return nil, fmt.Errorf("%d bytes at %d: got %d: %w", size, off, n, err)
	}
	return s.buf[:size], nil
}

// wanted is a line of what "ranges" is asked, and of what it answers.
type wanted struct {
	Path   string `json:"path"`
	Offset int64  `json:"offset"`
	Size   int64  `json:"size"`
	Digest string `json:"digest,omitempty"`
}

// runRanges reads parts of files, one JSON object a line in and out.
func runRanges(args []string) error {
	fs := newFlags("ranges")
	external := fs.String("toc", "", "file with the TOC of a blob that has none inside")
	pos, err := parse(fs, args, 1)
	if err != nil {
		return err
	}
	s, err := openShelf(pos[0], *external)
	if err != nil {
		return err
	}
	defer s.Close()
	return writeTo("-", func(w io.Writer) error {
		lines := json.NewEncoder(w)
		for in := json.NewDecoder(bufio.NewReader(os.Stdin)); ; {
			var want wanted
			if err := in.Decode(&want); err == io.EOF {
				return nil
			} else if err != nil {
				return err
			}
			file, err := s.OpenFile(want.Path)
			if err != nil {
				return err
			}
			p, err := s.readAt(file, want.Offset, want.Size)
			if err != nil {
				return fmt.Errorf("%q: %w", want.Path, err)
			}
			want.Digest = digest.FromBytes(p).String()
			if err := lines.Encode(want); err != nil {
				return err
			}
		}
	})
}
