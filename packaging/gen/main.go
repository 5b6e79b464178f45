// Gen writes the manual pages and the shells' completions of the programs into a folder, with the names that they have in
// the package:
//
//	gen -bin DIR -man DIR -out DIR -version VERSION -date YYYY-MM-DD
//
// Its one source is what each program says of itself with --describe; so no page can say what the program doesn't know.
// What no command line tells (examples, files) stands beside it, in packaging/man:
//
//	qmchain-backup.8   a comment with the page's one-line description, then sections to go between OPTIONS and EXIT STATUS
//	qmchain.7          and what else is a whole page; `.\" @keys@` stands for the keys of the configuration file
//
// Pages are in the macros of man(7). Completions ask the program, which knows best.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	var g generator
	flag.StringVar(&g.bin, "bin", "", "folder with the programs")
	flag.StringVar(&g.man, "man", "", "folder with what is written by hand")
	flag.StringVar(&g.out, "out", "", "folder to write to")
	flag.StringVar(&g.version, "version", "", "of the package")
	flag.StringVar(&g.date, "date", "", "of the pages")
	flag.Parse()
	if err := g.run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "gen:", err)
		os.Exit(1)
	}
}

type generator struct {
	bin, man, out string
	version, date string
}

func (g generator) run(ctx context.Context) error {
	paths, err := filepath.Glob(filepath.Join(g.bin, "qmchain-*"))
	if err != nil {
		return err
	}
	if len(paths) == 0 {
		return fmt.Errorf("no programs in %s", g.bin)
	}
	var programs []program
	for _, path := range paths {
		p, err := describe(ctx, path)
		if err != nil {
			return err
		}
		programs = append(programs, p)
	}
	for _, p := range programs {
		byHand, err := os.ReadFile(filepath.Join(g.man, p.Name+".8"))
		if err != nil {
			return err
		}
		page, err := g.page(p, string(byHand))
		if err != nil {
			return err
		}
		for name, text := range map[string]string{
			"usr/share/man/man8/" + p.Name + ".8":                     page,
			"usr/share/bash-completion/completions/" + p.Name:         completion(bashScript, p.Name),
			"usr/share/zsh/vendor-completions/_" + p.Name:             completion(zshScript, p.Name),
			"usr/share/fish/vendor_completions.d/" + p.Name + ".fish": completion(fishScript, p.Name),
		} {
			if err := g.write(name, text); err != nil {
				return err
			}
		}
	}
	for _, name := range []string{"qmchain.7", "qmchain.toml.5", "qmchain-json.5"} {
		text, err := os.ReadFile(filepath.Join(g.man, name))
		if err != nil {
			return err
		}
		page, err := g.whole(string(text), programs)
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		if err := g.write("usr/share/man/man"+name[len(name)-1:]+"/"+name, page); err != nil {
			return err
		}
	}
	return nil
}

func (g generator) write(name, text string) error {
	path := filepath.Join(g.out, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return os.WriteFile(path, []byte(text), 0o644)
}

// sections are those of the configuration file, in order.
func sections(programs []program) []string {
	var names []string
	for _, p := range programs {
		for name := range p.Config {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return slices.Compact(names)
}
