package inside

import (
	"strconv"
	"strings"
)

// section is a part of LVM's text: names with values (string, int64, []any of both, *section). A nil section is empty.
type section struct {
	values map[string]any
	order  []string
}

func (s *section) names() []string {
	if s == nil {
		return nil
	}
	return s.order
}

func (s *section) get(name string) any {
	if s == nil {
		return nil
	}
	return s.values[name]
}

func (s *section) section(name string) *section { v, _ := s.get(name).(*section); return v }
func (s *section) text(name string) string      { v, _ := s.get(name).(string); return v }
func (s *section) number(name string) int64     { v, _ := s.get(name).(int64); return v }
func (s *section) list(name string) []any       { v, _ := s.get(name).([]any); return v }

// Bounds of the text: LVM nests five deep, and a value is never long.
const (
	maxDepth  = 10
	maxValues = 1 << 20
)

// parser reads the syntax of lvm.conf(5), as far as LVM itself writes it.
type parser struct {
	rest string
	left int // values that may still come
}

func parseConfig(text string) (*section, error) {
	text, _, _ = strings.Cut(text, "\x00")
	p := &parser{rest: text, left: maxValues}
	return p.section(0)
}

// blank skips blanks and comments.
func (p *parser) blank() {
	for {
		p.rest = strings.TrimLeft(p.rest, " \t\r\n")
		if !strings.HasPrefix(p.rest, "#") {
			return
		}
		_, p.rest, _ = strings.Cut(p.rest, "\n")
	}
}

// take takes a sign, if it is the next one.
func (p *parser) take(sign string) bool {
	p.blank()
	rest, ok := strings.CutPrefix(p.rest, sign)
	p.rest = rest
	return ok
}

// section reads up to the end of the section: of the text at depth 0.
func (p *parser) section(depth int) (*section, error) {
	if depth > maxDepth {
		return nil, badLVM("nested too deep")
	}
	s := &section{values: map[string]any{}}
	for {
		p.blank()
		if p.rest == "" && depth == 0 || depth > 0 && p.take("}") {
			return s, nil
		}
		n := strings.IndexFunc(p.rest, func(r rune) bool { return strings.ContainsRune(" \t\r\n={}[]\",#", r) })
		if n <= 0 || p.left == 0 {
			return nil, badLVM("no name, %d bytes before the end", len(p.rest))
		}
		p.left--
		name := p.rest[:n]
		p.rest = p.rest[n:]
		var value any
		var err error
		switch {
		case p.take("{"):
			value, err = p.section(depth + 1)
		case p.take("="):
			value, err = p.value()
		default:
			err = badLVM("%s is no value and no section", printable(name))
		}
		if err != nil {
			return nil, err
		}
		if _, twice := s.values[name]; !twice {
			s.order = append(s.order, name)
		}
		s.values[name] = value
	}
}

func (p *parser) value() (any, error) {
	if !p.take("[") {
		return p.scalar()
	}
	list := []any{}
	for !p.take("]") {
		v, err := p.scalar()
		if err != nil {
			return nil, err
		}
		list = append(list, v)
		p.take(",")
	}
	return list, nil
}

// scalar reads a string or a whole number. A number with a fraction, which nothing here needs, is a string.
func (p *parser) scalar() (any, error) {
	if p.left == 0 {
		return nil, badLVM("too many values")
	}
	p.left--
	if p.take(`"`) {
		var b strings.Builder
		for i := 0; i < len(p.rest); i++ {
			switch c := p.rest[i]; c {
			case '"':
				p.rest = p.rest[i+1:]
				return b.String(), nil
			case '\\':
				if i++; i < len(p.rest) {
					b.WriteByte(p.rest[i])
				}
			default:
				b.WriteByte(c)
			}
		}
		return nil, badLVM("a string does not end")
	}
	n := strings.IndexAny(p.rest, " \t\r\n,]}")
	if n < 0 {
		n = len(p.rest)
	}
	word := p.rest[:n]
	p.rest = p.rest[n:]
	if word == "" {
		return nil, badLVM("a value is missing, %d bytes before the end", len(p.rest))
	}
	if i, err := strconv.ParseInt(word, 10, 64); err == nil {
		return i, nil
	}
	return word, nil
}
