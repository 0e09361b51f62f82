package main

import (
	"encoding/csv"
	"encoding/json"
	"fmt"
	"os"
	"strings"

	"github.com/moby/buildkit/util/compression"
)

// outputLine is what BuildKit makes of one --output line.
type outputLine struct {
	Attrs       map[string]string `json:"attrs,omitempty"`
	Compression string            `json:"compression,omitempty"`
	Level       *int              `json:"level,omitempty"`
	Force       bool              `json:"force"`
	Error       string            `json:"error,omitempty"`
}

// runOutput prints one JSON object for each of its arguments.
func runOutput(args []string) error {
	encoder := json.NewEncoder(os.Stdout)
	for _, line := range args {
		parsed := &outputLine{Attrs: map[string]string{}}
		if err := parsed.parse(line); err != nil {
			parsed = &outputLine{Error: err.Error()}
		}
		if err := encoder.Encode(parsed); err != nil {
			return err
		}
	}
	return nil
}

func (o *outputLine) parse(line string) error {
	fields, err := csv.NewReader(strings.NewReader(line)).Read()
	if err != nil {
		return err
	}
	for _, field := range fields {
		key, value, ok := strings.Cut(field, "=")
		if !ok {
			return fmt.Errorf("invalid value %s", field)
		}
		o.Attrs[strings.ToLower(key)] = value
	}
	config, err := compression.ParseAttributes(o.Attrs)
	if err != nil {
		return err
	}
	o.Compression, o.Level, o.Force = config.Type.String(), config.Level, config.Force
	return nil
}
