package cli

import (
	"errors"
	"fmt"
	"math"
	"reflect"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/alecthomas/kong"
)

// Durations of all flags, on the command line and in the configuration file, are numbers with units, as 90s, 26h, 1h30m or 7d. None
// is negative. Where 0 makes no sense either, the flag has the tag positive.
const positiveTag = "positive"

// durations is kong's mapper for all flags that are a time.Duration.
func durations() kong.Option {
	return kong.TypeMapper(reflect.TypeFor[time.Duration](), kong.MapperFunc(func(c *kong.DecodeContext, target reflect.Value) error {
		token, err := c.Scan.PopValue("time")
		if err != nil {
			return err
		}
		text := fmt.Sprint(token.Value)
		d, err := ParseDuration(text)
		if err == nil && d == 0 && c.Value.Tag.Has(positiveTag) {
			err = errors.New("must be more than 0")
		}
		if err != nil {
			return fmt.Errorf("%q %w", text, err)
		}
		target.SetInt(int64(d))
		return nil
	}))
}

// units are Go's own, and two that days are better counted in.
var units = map[string]time.Duration{
	"ns": time.Nanosecond, "us": time.Microsecond, "µs": time.Microsecond, "ms": time.Millisecond,
	"s": time.Second, "m": time.Minute, "h": time.Hour, "d": 24 * time.Hour, "w": 7 * 24 * time.Hour,
}

var (
	durationPart = regexp.MustCompile(`^([0-9]+(?:\.[0-9]+)?)([a-zµ]+)`)
	number       = regexp.MustCompile(`^[0-9]+(\.[0-9]+)?$`)
)

// ParseDuration reads a duration; a day has 24 hours. The error goes on after the text.
func ParseDuration(text string) (sum time.Duration, err error) {
	switch {
	case text == "0":
		return 0, nil
	case strings.HasPrefix(text, "-"):
		return 0, errors.New("is less than nothing")
	case number.MatchString(text):
		return 0, fmt.Errorf("has no unit: is it %ss, %sm, %sh or %sd?", text, text, text, text)
	}
	rest := text
	for {
		part := durationPart.FindStringSubmatch(rest)
		if part == nil || units[part[2]] == 0 {
			return 0, errors.New("is no time, as 90s, 10m, 26h, 1h30m, 7d and 2w are")
		}
		n, err := strconv.ParseFloat(part[1], 64)
		d := n * float64(units[part[2]])
		if err != nil || d >= math.MaxInt64-float64(sum) {
			return 0, errors.New("is too long a time")
		}
		sum += time.Duration(math.Round(d))
		if rest = rest[len(part[0]):]; rest == "" {
			return sum, nil
		}
	}
}
