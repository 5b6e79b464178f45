package ui

import (
	"bufio"
	"bytes"
	"encoding/json"
	"io"
	"reflect"
)

// buffered calls write with a buffer before w: a table is written cell by cell, of which each would be a system call.
func buffered(w io.Writer, write func(io.Writer) error) error {
	out := bufio.NewWriterSize(w, 64<<10)
	if err := write(out); err != nil {
		_ = out.Flush() // what there is of it is shown all the same
		return err
	}
	return out.Flush()
}

// document writes v as one JSON document. The elements of a list are written one by one: encoding/json would have all of it in
// memory, twice, before it writes any.
func document(w io.Writer, v any) error {
	list := reflect.ValueOf(v)
	if list.Kind() != reflect.Slice || list.Len() == 0 {
		return encode(w, v, "")
	}
	before := "[\n"
	var text bytes.Buffer
	for i := range list.Len() {
		text.Reset()
		text.WriteString(before + indent)
		if err := encode(&text, list.Index(i).Interface(), indent); err != nil {
			return err
		}
		if _, err := w.Write(bytes.TrimSuffix(text.Bytes(), []byte("\n"))); err != nil {
			return err
		}
		before = ",\n"
	}
	_, err := io.WriteString(w, "\n]\n")
	return err
}

const indent = "  "

func encode(w io.Writer, v any, prefix string) error {
	enc := json.NewEncoder(w)
	enc.SetIndent(prefix, indent)
	enc.SetEscapeHTML(false)
	return enc.Encode(v)
}
