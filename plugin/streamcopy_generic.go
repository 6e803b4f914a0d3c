// SPDX-License-Identifier: Apache-2.0

//go:build !amd64

package plugin

// streamCopy is copy, where we have nothing better for memory that is not read soon.
func streamCopy(to, from []byte) { copy(to, from) }
