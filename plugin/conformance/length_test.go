// SPDX-License-Identifier: Apache-2.0

//go:build !soak

package conformance_test

const (
	// operations is how many random operations each handler gets, some of them a part only.
	operations = 5_000
	// long has the handlers tested too that take long.
	long = false
)
