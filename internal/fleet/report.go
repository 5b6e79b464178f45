package fleet

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/mail"
	"os/exec"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"

	"github.com/dustin/go-humanize"
)

// Report is the outcomes of one run of the program.
type Report struct {
	Host     string
	Repo     string
	Began    time.Time
	Took     time.Duration
	Outcomes []Outcome
}

// bad tells whether somebody should have a look.
func (r Report) bad() bool { return Count(r.Outcomes, Failed)+Count(r.Outcomes, Warning) > 0 }

// Subject says in one line how it went.
func (r Report) Subject() string {
	state := "all is well"
	if failed, warned := Count(r.Outcomes, Failed), Count(r.Outcomes, Warning); failed > 0 {
		state = fmt.Sprintf("%d of %d guests FAILED", failed, len(r.Outcomes))
	} else if warned > 0 {
		state = fmt.Sprintf("%d of %d guests with warnings", warned, len(r.Outcomes))
	}
	return fmt.Sprintf("qmchain-backup on %s: %s", r.Host, state)
}

// Write writes the report. Its table has a line for each guest, and tabs between the columns.
func (r Report) Write(w io.Writer) error {
	fmt.Fprintf(w, "%s\n\n", r.Subject())
	fmt.Fprintln(w, "GUEST\tNAME\tRESULT\tLEVEL\tSIZE\tSTORED\tTIME\tREMARK")
	var all int64
	for _, o := range r.Outcomes {
		level, size, stored := "-", "-", "-"
		if o.Point != "" {
			level, size, stored = o.Level, humanize.IBytes(uint64(o.Size)), humanize.IBytes(uint64(o.Stored))
		}
		remark := strings.Join(o.Remarks, "; ")
		if o.Verdict == Failed {
			remark = fmt.Sprintf("exit code %d: %s", o.Code, remark)
		}
		all += o.Stored
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", o.Guest, oneLine(o.Name), o.Verdict, level, size, stored, o.Took.Round(100*time.Millisecond), oneLine(remark))
	}
	_, err := fmt.Fprintf(w, "\n%d ok, %d with warnings, %d failed, %d left out; %s stored in %s\nbegan %s, took %s\n",
		Count(r.Outcomes, Good), Count(r.Outcomes, Warning), Count(r.Outcomes, Failed), Count(r.Outcomes, Skipped),
		humanize.IBytes(uint64(all)), r.Repo, r.Began.Format("2006-01-02 15:04:05 MST"), r.Took.Round(time.Second))
	return err
}

// oneLine makes a text, which may be a guest's or a program's, one that can't spoil the table or the terminal.
func oneLine(s string) string {
	return strings.Join(strings.Fields(strings.Map(func(r rune) rune {
		if unicode.IsSpace(r) {
			return ' '
		}
		if !unicode.IsPrint(r) {
			return unicode.ReplacementChar
		}
		return r
	}, s)), " ")
}

// Text is the whole report, its columns lined up.
func (r Report) Text() string {
	var b strings.Builder
	t := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	_ = errors.Join(r.Write(t), t.Flush()) // into memory
	return b.String()
}

// When says when a report is mailed.
type When string

// Whens.
const (
	Always    When = "always"
	OnFailure When = "failure" // and on warnings
	Never     When = "never"
)

// mailLimit bounds the handing over of a mail.
const mailLimit = time.Minute

// Mail hands the report to the system's mail, if when says so.
func (r Report) Mail(ctx context.Context, sendmail string, to []string, when When) error {
	if len(to) == 0 || when == Never || when == OnFailure && !r.bad() {
		return nil
	}
	args := []string{"-i", "--"}
	for _, text := range to {
		a, err := CheckAddress(text)
		if err != nil {
			return err
		}
		args = append(args, a)
	}
	ctx, cancel := context.WithTimeout(ctx, mailLimit)
	defer cancel()
	cmd := exec.CommandContext(ctx, sendmail, args...)
	cmd.Stdin = bytes.NewReader(r.message(args[2:]))
	cmd.WaitDelay = time.Second
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("mail: %s: %w: %s", sendmail, errors.Join(err, ctx.Err()), oneLine(stderr.String()))
	}
	return nil
}

// CheckAddress says what is wrong with the address of a mail, and returns it bare. A name without a host is a user here.
func CheckAddress(text string) (string, error) {
	if text != "" && strings.IndexFunc(text, func(r rune) bool { return !unicode.IsLetter(r) && !unicode.IsDigit(r) && r != '_' && r != '-' }) < 0 && text[0] != '-' {
		return text, nil
	}
	a, err := mail.ParseAddress(text)
	if err != nil {
		return "", fmt.Errorf("mail: %q is no address: %w", text, err)
	}
	return a.Address, nil
}

func (r Report) message(to []string) []byte {
	var b bytes.Buffer
	fmt.Fprintf(&b, "To: %s\n", strings.Join(to, ", "))
	fmt.Fprintf(&b, "Subject: %s\n", mime.QEncoding.Encode("utf-8", oneLine(r.Subject())))
	fmt.Fprintf(&b, "Date: %s\n", r.Began.Add(r.Took).Format(time.RFC1123Z))
	b.WriteString("Auto-Submitted: auto-generated\nMIME-Version: 1.0\nContent-Type: text/plain; charset=utf-8\nContent-Transfer-Encoding: 8bit\n\n")
	b.WriteString(r.Text())
	return b.Bytes()
}
