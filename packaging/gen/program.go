package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// program is what a program says of its own command line, with --describe.
type program struct {
	command
	ExitCodes string              `json:"exit_codes"`
	Config    map[string][]string `json:"config"` // sections of the configuration file, and the commands that each is for
}

type command struct {
	Name     string    `json:"name"`
	Help     string    `json:"help"`
	Detail   string    `json:"detail"`
	Flags    []value   `json:"flags"`
	Args     []value   `json:"args"`
	Examples []example `json:"examples"`
	Commands []command `json:"commands"`
}

// example is a command line, without the program's name, and what it does.
type example struct {
	For  string `json:"for"`
	Line string `json:"line"`
}

// value is a flag or an argument.
type value struct {
	Name      string   `json:"name"`
	Short     string   `json:"short"`
	Help      string   `json:"help"`
	Value     string   `json:"value"` // a flag's; without, it takes none
	Default   string   `json:"default"`
	Choices   []string `json:"choices"`
	Env       []string `json:"env"`
	Required  bool     `json:"required"`
	Repeated  bool     `json:"repeated"`
	Negatable string   `json:"negatable"`
	Config    bool     `json:"config"`
}

// describeLimit is far more than any program needs to say what it is.
const describeLimit = 30 * time.Second

// describe asks a program.
func describe(ctx context.Context, path string) (program, error) {
	ctx, cancel := context.WithTimeout(ctx, describeLimit)
	defer cancel()
	cmd := exec.CommandContext(ctx, path, "--describe")
	cmd.Env = append(os.Environ(), "QMCHAIN_CONFIG=") // this host's settings are none of the package's
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	text, err := cmd.Output()
	if err != nil {
		return program{}, fmt.Errorf("%s --describe: %w: %s", path, err, strings.TrimSpace(stderr.String()))
	}
	return parse(filepath.Base(path), text)
}

// parse reads what a program says. What the templates can't show is an error.
func parse(name string, text []byte) (program, error) {
	decoder := json.NewDecoder(bytes.NewReader(text))
	decoder.DisallowUnknownFields()
	var p program
	if err := decoder.Decode(&p); err != nil {
		return program{}, fmt.Errorf("%s: %w", name, err)
	}
	if p.Name != name {
		return program{}, fmt.Errorf("%s calls itself %q", name, p.Name)
	}
	if len(p.Commands) == 0 {
		return program{}, fmt.Errorf("%s has no commands", name)
	}
	for _, c := range p.Commands {
		if len(c.Commands) > 0 {
			return program{}, fmt.Errorf("%s: %s has commands of its own, which these pages can't show", name, c.Name)
		}
		for _, v := range slices.Concat(c.Flags, c.Args) {
			if v.Help == "" {
				return program{}, fmt.Errorf("%s: %s: %s has no help", name, c.Name, v.Name)
			}
		}
	}
	return p, nil
}
