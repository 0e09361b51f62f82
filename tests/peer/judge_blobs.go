package main

import (
	"bytes"
	"encoding/json"
	"io"

	"github.com/containerd/stargz-snapshotter/estargz"
)

func init() {
	judgements["entries"] = judgeEntries
	judgements["tar"] = judgeTar
	judgements["shelf"] = judgeShelf
}

func judgeTar(data []byte) (any, error) {
	found := []*tarEntry{}
	err := eachEntry(bytes.NewReader(data), func(e *tarEntry) error {
		found = append(found, e)
		return nil
	})
	return found, err
}

// judgeEntries decodes a TOC as the reader's decompressors do.
func judgeEntries(data []byte) (any, error) {
	toc := new(estargz.JTOC)
	err := json.NewDecoder(bytes.NewReader(data)).Decode(toc)
	return toc.Entries, err
}

// judgeShelf gives what the Reader serves of a blob.
func judgeShelf(data []byte) (any, error) {
	s, err := newShelf(io.NewSectionReader(bytes.NewReader(data), 0, int64(len(data))), "")
	if err != nil {
		return nil, err
	}
	found := []*served{}
	for e := range s.entries {
		found = append(found, e)
	}
	return found, nil
}
