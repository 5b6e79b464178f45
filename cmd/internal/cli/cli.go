// Package cli is what the programs' command lines have in common: it reads the arguments with kong, sets up the user
// interface, and turns errors into exit codes. A program's main is one call of Main.
package cli

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/alecthomas/kong"

	"qmchain/cmd/internal/conf"
	"qmchain/internal/ui"
)

// Version is set by the linker.
var Version = "devel"

// Common are the flags of all programs.
type Common struct {
	Quiet   bool             `short:"q" help:"No log but errors; results are printed."`
	Verbose bool             `short:"v" help:"Print what is done in detail."`
	LogFile string           `placeholder:"FILE" help:"Write the log to FILE too."`
	Version kong.VersionFlag `help:"Print the version."`

	Describe describeFlag `hidden:"" conf:"no" help:"Print the command line as JSON."`
}

// Env is what a program gets from outside, so that tests can give it something else.
type Env struct {
	Stdout, Stderr io.Writer
	Getenv         func(string) string
	Config         string // the configuration file's usual place; empty: there is none
}

// Program describes a program.
type Program struct {
	Name        string
	Description string
	// Grammar points to a kong grammar whose commands have a method Run(context.Context, *ui.UI, …) error. Common must
	// point to the Common in it.
	Grammar any
	Common  *Common
	// Bind are further arguments for the commands' Run methods, by type.
	Bind []any
	// Scope says which sections of the configuration file are for which commands.
	Scope conf.Scope
	// Explain gives an error its exit code and its hint.
	Explain func(error) error
	// Complete finds what shells can offer for values.
	Complete Sources
}

// Main runs the program with the process's own arguments and ends the process.
func Main(p Program) { MainOf(p.Run) }

// MainOf is Main for what stands around a program's Run.
func MainOf(run func(ctx context.Context, args []string, env Env) (code int)) {
	if len(os.Args) > 1 && os.Args[1] == completeCommand {
		os.Exit(supervise(os.Args[2:], os.Stdout, completeLimit))
	}
	// Who reads the log or the result may go away before the program is done: that must not kill it in the middle of things.
	// A handler, in place of ignoring it, is not passed on to children.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE)
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	// The first signal begins an orderly end. After it the default is back: a second one ends the process at once.
	context.AfterFunc(ctx, stop)
	os.Exit(run(ctx, os.Args[1:], Env{os.Stdout, os.Stderr, os.Getenv, conf.Path}))
}

// Again reads the command line anew, with the configuration file's section of one guest, into a grammar of the program's
// type. Commands that work on several guests are given it: each guest can have settings of its own.
type Again func(guest string, grammar any) error

// Named is a VM's name in repositories: its VMID, unless its section of the configuration file has another.
type Named func(vmid string) string

// exit is panicked with where kong ends the program: after --help and --version.
type exit struct {
	code int
	err  error // what was asked for could not be shown
}

// Run runs the program and returns its exit code.
func (p Program) Run(ctx context.Context, args []string, env Env) (code int) {
	defer func() {
		switch r := recover().(type) {
		case nil:
		case exit:
			code = r.code
			if r.err != nil {
				code = ui.ReportError(env.Stderr, env.Getenv, r.err)
			}
		default:
			panic(r)
		}
	}()
	if len(args) > 0 && args[0] == lookCommand {
		return p.look(args[1:], env)
	}
	args = asked(args)
	kctx, err := p.parse(args, env, "", p.Grammar)
	if err != nil {
		return ui.ReportError(env.Stderr, env.Getenv, err)
	}
	u, err := ui.New(env.Stdout, env.Stderr, env.Getenv, ui.Options{Quiet: p.Common.Quiet, Verbose: p.Common.Verbose, LogFile: p.Common.LogFile})
	if err != nil {
		return ui.ReportError(env.Stderr, env.Getenv, err)
	}
	defer u.Close()
	kctx.BindTo(ctx, (*context.Context)(nil))
	kctx.Bind(u)
	kctx.Bind(p.Bind...)
	kctx.Bind(Again(func(guest string, grammar any) error {
		_, err := p.parse(args, env, guest, grammar)
		return err
	}))
	file, _ := conf.Find(env.Getenv(conf.Variable), env.Config) // which parse was content with
	kctx.Bind(Named(func(vmid string) string { return cmp.Or(file.Of(vmid, "name"), vmid) }))
	return u.Finish(explainSystem(p.Explain(kctx.Run())))
}

// parse reads the command line into a grammar.
func (p Program) parse(args []string, env Env, guest string, grammar any) (*kong.Context, error) {
	stdout := &shown{w: env.Stdout}
	options := []kong.Option{
		kong.Name(p.Name),
		kong.Description(p.Description),
		kong.Writers(stdout, env.Stderr),
		kong.Exit(func(code int) { panic(exit{code, stdout.err}) }),
		kong.ConfigureHelp(kong.HelpOptions{Compact: true, WrapUpperBound: maxHelpWidth}),
		kong.Help(help),
		kong.Vars{"version": p.Name + " " + Version},
		kong.Bind(p.Scope),
		durations(),
		kong.ValueFormatter(helpOf),
	}
	explain := func(err error) error { return err }
	file, fileErr := conf.Find(env.Getenv(conf.Variable), env.Config)
	if file != nil {
		resolver := file.Resolver(p.Scope, guest)
		options = append(options, kong.Resolvers(resolver))
		explain = resolver.Explain
	}
	parser, err := kong.New(grammar, options...)
	if err != nil {
		return nil, err
	}
	kctx, err := parser.Parse(args)
	if err != nil && stdout.err != nil {
		return nil, stdout.err
	}
	if err == nil {
		err = fileErr // after --help, which needs no file
	}
	if err != nil {
		if ui.HintOf(err) == "" {
			err = ui.Hint(explain(plainly(err)), fmt.Sprintf("`%s --help` explains", p.chosen(err)))
		}
		return nil, ui.Exit(ui.ExitUsage, err)
	}
	return kctx, nil
}

// shown is standard output for help texts: who reads them may have seen enough, as head has.
type shown struct {
	w   io.Writer
	err error
}

func (s *shown) Write(p []byte) (int, error) {
	if _, err := s.w.Write(p); ui.Shown(err) != nil {
		s.err = ui.Shown(err)
		return 0, s.err
	}
	return len(p), nil
}

// chosen is as much of the command line as has named a command, where the rest of it is wrong.
func (p Program) chosen(err error) string {
	var wrong *kong.ParseError
	if errors.As(err, &wrong) && wrong.Context.Selected() != nil {
		return wrong.Context.Selected().FullPath()
	}
	return p.Name
}
