package stream

import (
	"bytes"
	"strings"
	"testing"

	"qmchain/chain"
)

// A list of points that is read is written again as it was, and names nothing but points.
func FuzzHave(f *testing.F) {
	for _, text := range []string{
		`{"format":1,"repository":"ab","points":[{"guest":"110","id":"20261120T101523Z-0001","uuid":"x"},{"guest":"web","id":"20261120T101523Z-0001","uuid":"y"}]}`,
		`{"format":1,"points":[{"guest":"110","id":"20261120T101523Z-0001","uuid":"x"},{"guest":"110","id":"20261120T101523Z-0001","uuid":"y"}]}`,
		`{"format":2}`, `{"format":1,"points":[{"guest":"../x","id":"20261120T101523Z-0001","uuid":"x"}]}`, `{"format":1,"points":null}`, `qmchain: no such repository`, ``,
	} {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		h, err := ReadHave(bytes.NewReader(text))
		if err != nil {
			if !strings.Contains(err.Error(), "list of points") && len(text) > 0 {
				t.Errorf("an error that does not say what of: %v", err)
			}
			return
		}
		var out bytes.Buffer
		if err := h.Write(&out); err != nil {
			t.Fatal(err)
		}
		again, err := ReadHave(&out)
		if err != nil || again.Repository != h.Repository || len(again.order) != len(h.order) {
			t.Fatalf("%+v became %+v, %v", h, again, err)
		}
		for _, k := range h.order {
			if _, err := chain.ParseID(string(k.id)); err != nil || chain.CheckGuestName(k.guest) != nil || h.uuid(k.guest, k.id) == "" {
				t.Errorf("point %+v", k)
			}
			if again.uuid(k.guest, k.id) != h.uuid(k.guest, k.id) {
				t.Errorf("%+v has become another point", k)
			}
		}
	})
}
