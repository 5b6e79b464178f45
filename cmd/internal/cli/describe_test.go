package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"

	"qmchain/cmd/internal/conf"
	"qmchain/internal/ui"
)

func TestDescribe(t *testing.T) {
	t.Parallel()
	var g struct {
		Common
		Take struct {
			Level  string   `enum:"full,inc" default:"inc" help:"How."`
			Repo   string   `required:"" env:"SAMPLE_REPO" placeholder:"DIR" help:"Where."`
			All    bool     `short:"a" conf:"no" negatable:"" help:"All."`
			Secret string   `hidden:"" help:"Not told."`
			VMID   []string `arg:"" optional:"" name:"vmid" help:"Which."`
		} `cmd:"" help:"Take it."`
		Hidden struct{} `cmd:"" hidden:"" help:"Not told."`
	}
	// A configuration file that can't be read is no reason not to answer.
	config := filepath.Join(t.TempDir(), "config.toml")
	if err := os.WriteFile(config, []byte("nonsense"), 0o600); err != nil {
		t.Fatal(err)
	}
	p := Program{
		Name: "sample", Description: "Does things.", Grammar: &g, Common: &g.Common,
		Scope: conf.Scope{"take": {"take"}}, Explain: func(err error) error { return err },
	}
	var stdout, stderr bytes.Buffer
	code := p.Run(context.Background(), []string{"--describe"}, Env{&stdout, &stderr, func(string) string { return "" }, config})
	if code != ui.ExitOK || stderr.Len() > 0 {
		t.Fatalf("exit code %d: %s", code, stderr.String())
	}
	var got describedProgram
	if err := json.Unmarshal(stdout.Bytes(), &got); err != nil {
		t.Fatal(err)
	}
	want := describedCommand{
		Name: "take", Help: "Take it.",
		Flags: []describedValue{
			{Name: "level", Help: "How.", Value: "full|inc", Default: "inc", Choices: []string{"full", "inc"}, Config: true},
			{Name: "repo", Help: "Where.", Value: "DIR", Env: []string{"SAMPLE_REPO"}, Required: true, Config: true},
			{Name: "all", Short: "a", Help: "All.", Negatable: "no-all"},
		},
		Args: []describedValue{{Name: "vmid", Help: "Which.", Repeated: true}},
	}
	if diff := cmp.Diff([]describedCommand{want}, got.Commands); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	if got.Help != "Does things." || got.ExitCodes != ui.ExitCodes() || len(got.Config["take"]) != 1 {
		t.Errorf("%+v", got)
	}
	for _, f := range got.Flags {
		if f.Name == "describe" {
			t.Error("--describe tells of itself")
		}
	}
}
