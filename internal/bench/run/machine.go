package main

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"time"

	"qmchain/internal/bench/figures"
)

// toolLimit bounds a look at the machine.
const toolLimit = 20 * time.Second

// machine is what figures depend on, but for qmchain itself. dir is where the benchmarks work.
func machine(ctx context.Context, dir string) []figures.Fact {
	facts := []figures.Fact{
		{Name: "processor", Value: fmt.Sprintf("%s, %d of them", fieldOf("/proc/cpuinfo", "model name"), runtime.NumCPU())},
		{Name: "memory", Value: memory()},
		{Name: "file system", Value: says(ctx, `\S+`, "findmnt", "--noheadings", "--output", "FSTYPE", "--target", dir)},
		{Name: "system", Value: strings.Trim(fieldOf("/etc/os-release", "PRETTY_NAME"), `"`) + ", Linux " + says(ctx, `\S+`, "uname", "-r")},
	}
	for _, program := range []string{"qemu-img", "qemu-storage-daemon", "qemu-nbd", "nbdfuse", "nbdkit", "guestmount", "cp", "sha256sum"} {
		facts = append(facts, figures.Fact{Name: program, Value: says(ctx, `\d+\.\d+[\d.]*`, program, "--version")})
	}
	return append(facts, figures.Fact{Name: "Go", Value: runtime.Version()})
}

// says finds the first of what a program says that matches a pattern.
func says(ctx context.Context, pattern, program string, args ...string) string {
	ctx, cancel := context.WithTimeout(ctx, toolLimit)
	defer cancel()
	out, err := exec.CommandContext(ctx, program, args...).Output()
	if err != nil {
		return "missing"
	}
	if found := regexp.MustCompile(pattern).Find(out); found != nil {
		return string(found)
	}
	return "unknown"
}

// fieldOf is the value of a line "name: value" or "name=value" of a file.
func fieldOf(path, name string) string {
	text, err := os.ReadFile(path)
	if err != nil {
		return "unknown"
	}
	for lines := bufio.NewScanner(bytes.NewReader(text)); lines.Scan(); {
		rest, found := strings.CutPrefix(lines.Text(), name)
		if found {
			return strings.TrimSpace(strings.TrimLeft(rest, " \t:="))
		}
	}
	return "unknown"
}

func memory() string {
	var kib float64
	if _, err := fmt.Sscanf(fieldOf("/proc/meminfo", "MemTotal"), "%f kB", &kib); err != nil {
		return "unknown"
	}
	return fmt.Sprintf("%.0f GiB", kib/(1<<20))
}

// load is the machine's load average of the last minute; 0 if it is not known.
func load() float64 {
	text, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return 0
	}
	one, _, _ := strings.Cut(string(text), " ")
	v, err := strconv.ParseFloat(one, 64)
	if err != nil {
		return 0
	}
	return v
}
