// SPDX-License-Identifier: Apache-2.0

package shared

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestLayoutMatchesHeader compiles a program that prints what channel.h says and compares it with Go's view.
func TestLayoutMatchesHeader(t *testing.T) {
	t.Parallel()
	want := []struct {
		c    string
		view uint64
	}{
		{"TCMUR_CHANNEL_MAGIC", channelMagic},
		{"TCMUR_CHANNEL_VERSION", channelVersion},
		{"TCMUR_RING_ENTRIES", RingEntries},
		{"TCMUR_MAX_PAYLOAD", MaxPayload},
		{"TCMUR_ARENA_OFFSET", arenaOffset},
		{"TCMUR_OP_READ", uint64(OpRead)},
		{"TCMUR_OP_WRITE", uint64(OpWrite)},
		{"TCMUR_OP_FLUSH", uint64(OpFlush)},
		{"TCMUR_OP_UNMAP", uint64(OpUnmap)},
		{"TCMUR_OP_ZERO", uint64(OpZero)},
		{"sizeof(struct tcmur_sqe)", sqeSize},
		{"sizeof(struct tcmur_cqe)", cqeSize},
		{"offsetof(struct tcmur_submit, magic)", offMagic},
		{"offsetof(struct tcmur_submit, version)", offVersion},
		{"offsetof(struct tcmur_submit, submit_arena_size)", offSubmitArenaSize},
		{"offsetof(struct tcmur_submit, complete_arena_size)", offCompleteArenaSize},
		{"offsetof(struct tcmur_submit, sq_bell)", offSQBell},
		{"offsetof(struct tcmur_submit, cq_waiting)", offCQWaiting},
		{"offsetof(struct tcmur_submit, sq)", ringOffset},
		{"offsetof(struct tcmur_complete, cq_bell)", offCQBell},
		{"offsetof(struct tcmur_complete, sq_sleepers)", offSQSleepers},
		{"offsetof(struct tcmur_complete, cq)", ringOffset},
		{"offsetof(struct tcmur_sqe, seq)", sqeSeq},
		{"offsetof(struct tcmur_sqe, tag)", sqeTag},
		{"offsetof(struct tcmur_sqe, gen)", sqeGen},
		{"offsetof(struct tcmur_sqe, op)", sqeOp},
		{"offsetof(struct tcmur_sqe, device)", sqeDevice},
		{"offsetof(struct tcmur_sqe, offset)", sqeOffset},
		{"offsetof(struct tcmur_sqe, length)", sqeLength},
		{"offsetof(struct tcmur_sqe, payload)", sqePayload},
		{"offsetof(struct tcmur_cqe, seq)", cqeSeq},
		{"offsetof(struct tcmur_cqe, tag)", cqeTag},
		{"offsetof(struct tcmur_cqe, gen)", cqeGen},
		{"offsetof(struct tcmur_cqe, sts)", cqeSTS},
		{"offsetof(struct tcmur_cqe, error)", cqeError},
		{"offsetof(struct tcmur_cqe, handler_ns)", cqeNanos},
		{"offsetof(struct tcmur_sqe, flags)", sqeFlags},
		{"offsetof(struct tcmur_cqe, flags)", cqeFlags},
		{"TCMUR_SQE_IN_PLACE", flagMayInPlace},
		{"TCMUR_CQE_IN_PLACE", flagInPlace},
		{"TCMUR_WAITING_ASLEEP", waitingAsleep},
		{"TCMUR_WAITING_ATTENDS", waitingAttends},
		{"TCMUR_SLEEPERS_BACK_SOON", sleepersBackSoon},
	}
	var src strings.Builder
	src.WriteString("#include <stdio.h>\n#include \"channel.h\"\nint main(void) {\n")
	for _, w := range want {
		fmt.Fprintf(&src, "printf(\"%%llu\\n\", (unsigned long long)(%s));\n", w.c)
	}
	src.WriteString("return 0; }\n")
	dir := t.TempDir()
	file, bin := filepath.Join(dir, "layout.c"), filepath.Join(dir, "layout")
	if err := os.WriteFile(file, []byte(src.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("gcc", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-I.", "-o", bin, file).CombinedOutput()
	if err != nil {
		t.Fatalf("gcc: %v\n%s", err, out)
	}
	out, err = exec.Command(bin).Output()
	if err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(strings.NewReader(string(out)))
	for _, w := range want {
		if !lines.Scan() {
			t.Fatalf("no value for %s", w.c)
		}
		if got := lines.Text(); got != fmt.Sprint(w.view) {
			t.Errorf("%s is %s in channel.h and %d in Go", w.c, got, w.view)
		}
	}
}
