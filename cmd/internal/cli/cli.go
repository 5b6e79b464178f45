// Package cli is what the programs' command lines have in common: it reads the arguments with kong, sets up the user
// interface, and turns errors into exit codes. A program's main is one call of Main.
package cli

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/alecthomas/kong"

	"qmchain/internal/ui"
)

// Version is set by the linker.
var Version = "devel"

// Common are the flags of all programs.
type Common struct {
	Quiet   bool             `short:"q" help:"Print only errors."`
	Verbose bool             `short:"v" help:"Print what is done in detail."`
	LogFile string           `placeholder:"FILE" help:"Write the log to FILE too."`
	Version kong.VersionFlag `help:"Print the version."`
}

// Env is what a program gets from outside, so that tests can give it something else.
type Env struct {
	Stdout, Stderr io.Writer
	Getenv         func(string) string
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
	// Explain gives an error its exit code and its hint.
	Explain func(error) error
}

// Main runs the program with the process's own arguments and ends the process.
func Main(p Program) {
	// Who reads the log or the result may go away before the program is done: that must not kill it in the middle of things.
	// A handler, in place of ignoring it, is not passed on to children.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE)
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	// The first signal begins an orderly end. After it the default is back: a second one ends the process at once.
	context.AfterFunc(ctx, stop)
	os.Exit(p.Run(ctx, os.Args[1:], Env{os.Stdout, os.Stderr, os.Getenv}))
}

// exit is panicked with where kong ends the program: after --help and --version.
type exit int

// Run runs the program and returns its exit code.
func (p Program) Run(ctx context.Context, args []string, env Env) (code int) {
	defer func() {
		switch r := recover().(type) {
		case nil:
		case exit:
			code = int(r)
		default:
			panic(r)
		}
	}()
	parser, err := kong.New(p.Grammar,
		kong.Name(p.Name),
		kong.Description(p.Description+"\n\nExit codes:\n"+ui.ExitCodes()),
		kong.Writers(env.Stdout, env.Stderr),
		kong.Exit(func(code int) { panic(exit(code)) }),
		kong.ConfigureHelp(kong.HelpOptions{Compact: true}),
		kong.UsageOnError(),
		kong.Vars{"version": p.Name + " " + Version},
	)
	if err != nil {
		return ui.ReportError(env.Stderr, err)
	}
	kctx, err := parser.Parse(args)
	if err != nil {
		return ui.ReportError(env.Stderr, ui.Exit(ui.ExitUsage, ui.Hint(err, fmt.Sprintf("`%s --help` explains", p.Name))))
	}
	u, err := ui.New(env.Stdout, env.Stderr, env.Getenv, ui.Options{Quiet: p.Common.Quiet, Verbose: p.Common.Verbose, LogFile: p.Common.LogFile})
	if err != nil {
		return ui.ReportError(env.Stderr, err)
	}
	defer u.Close()
	kctx.BindTo(ctx, (*context.Context)(nil))
	kctx.Bind(u)
	kctx.Bind(p.Bind...)
	return u.Finish(p.Explain(kctx.Run()))
}
