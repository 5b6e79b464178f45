package cli

import (
	"fmt"
	"math"

	"github.com/dustin/go-humanize"

	"qmchain/internal/ui"
)

// Size reads the value of a flag that is a number of bytes, such as 50MiB; 0 if it was not given.
func Size(flag, text string) (int64, error) {
	if text == "" {
		return 0, nil
	}
	n, err := humanize.ParseBytes(text)
	if err != nil || n > math.MaxInt64 {
		return 0, ui.Exit(ui.ExitUsage, fmt.Errorf("%s: %q is not a size", flag, text))
	}
	return int64(n), nil
}
