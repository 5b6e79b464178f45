package main

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"

	"qmchain/chain"
)

// Whoever has written the file: what is kept of it can be printed, and written as JSON.
func FuzzDrilled(f *testing.F) {
	whole, err := json.Marshal(drilled{Guest: "110", ID: "20261120T101523Z-3f9c", Time: time.Unix(1_800_000_000, 0), Why: "no sign of life within 5m", Seconds: 300})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(whole)
	f.Add([]byte(strings.Replace(string(whole), "no sign", `\u001b[2J\ud800`+strings.Repeat("ü", maxWhy), 1)))
	f.Add([]byte(`{"id":"20261120T101523Z-3f9c","time":"9999-12-31T23:59:59+14:00","seconds":-1e308}`))
	f.Add([]byte("null"))
	f.Fuzz(func(t *testing.T, text []byte) {
		d, err := readDrilled("-", bytes.NewReader(text))
		if err != nil {
			return
		}
		if _, err := chain.ParseID(string(d.ID)); err != nil {
			t.Error(err)
		}
		if len(d.Why) > maxWhy || !utf8.ValidString(d.Why) || strings.ContainsFunc(d.Why, func(r rune) bool { return !unicode.IsPrint(r) }) {
			t.Errorf("%q", d.Why)
		}
		if _, err := json.Marshal(d.record()); err != nil {
			t.Error(err)
		}
	})
}
