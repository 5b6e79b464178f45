package main

import (
	"context"
	"errors"
	"fmt"
	"io"

	"qmchain/internal/durable"
	"qmchain/internal/fleet"
	"qmchain/internal/ui"
)

// reportFlags say who is told how it went.
type reportFlags struct {
	Report   string     `placeholder:"FILE" help:"Write the report, a line for each guest, to FILE."`
	MailTo   []string   `placeholder:"ADDR" complete:"none" help:"Mail the report there. Can be given several times."`
	MailWhen fleet.When `enum:"failure,always,never" default:"failure" help:"When to mail it: failure means that something failed or went not quite as asked."`
}

func (f *reportFlags) check() error {
	for _, to := range f.MailTo {
		if _, err := fleet.CheckAddress(to); err != nil {
			return ui.Exit(ui.ExitUsage, fmt.Errorf("--mail-to: %w", err))
		}
	}
	return nil
}

// summaryEvent is the last event of several guests.
type summaryEvent struct {
	Event  string          `json:"event"`
	Host   string          `json:"host"`
	Guests []fleet.Outcome `json:"guests"`
}

// send shows, writes and mails the report. That an interrupted run is reported too is the point of it.
func (f *reportFlags) send(ctx context.Context, u *ui.UI, n node, report fleet.Report, shown *display) error {
	ctx = context.WithoutCancel(ctx)
	var errs []error
	switch {
	case shown.asJSON && shown.several:
		errs = append(errs, u.Event(summaryEvent{"summary", report.Host, report.Outcomes}))
	case shown.several:
		u.Note(func(w io.Writer) error {
			fmt.Fprintln(w)
			err := report.Write(w)
			fmt.Fprintln(w)
			return err
		})
	}
	if f.Report != "" {
		if err := (durable.FS{}).WriteFile(f.Report, []byte(report.Text()), 0o600); err != nil {
			errs = append(errs, fmt.Errorf("--report: %w", err))
		}
	}
	errs = append(errs, report.Mail(ctx, n.Sendmail, f.MailTo, f.MailWhen))
	err := errors.Join(errs...)
	if err != nil {
		u.Log.Warn(err)
	}
	return ui.Exit(ui.ExitPartly, err)
}
