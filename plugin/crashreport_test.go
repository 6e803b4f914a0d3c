// SPDX-License-Identifier: Apache-2.0

package plugin

import "testing"

func TestCrashReport(t *testing.T) {
	const begin = `e":"cut off in the middle"}` + "\n"
	const said = `{"@level":"info","@message":"handler printed: a.c:7: x > 0 failed","stream":"stderr"}` + "\n"
	const noise = `{"@level":"error","@message":"some message","@module":"host"}` + "\n"
	const crash = "[ERROR] handler died of SIGABRT in write(device ram000, offset 0, length 512)\n" +
		"[ERROR] handler backtrace: handler_ram.so+0x12 ram_write\n"
	for name, tt := range map[string]struct{ log, want string }{
		"nothing":      {"", ""},
		"only the log": {begin + said + noise, ""},
		"crash": {
			begin + noise + crash,
			"died of SIGABRT in write(device ram000, offset 0, length 512)\nbacktrace: handler_ram.so+0x12 ram_write\n",
		},
		"assertion": {
			begin + said + crash[:len(crash)-len(crash)/2] + "\n",
			"printed: a.c:7: x > 0 failed\n" + crash[len(crashPrefix):len(crash)-len(crash)/2] + "\n",
		},
		"panic":        {noise + "panic: oh\n\ngoroutine 1:\n", "panic: oh\ngoroutine 1:\n"},
		"at the begin": {crash[:30], crash[len(crashPrefix):30] + "\n"},
	} {
		if got := crashReport(tt.log); got != tt.want {
			t.Errorf("%s: %q, want %q", name, got, tt.want)
		}
	}
}
