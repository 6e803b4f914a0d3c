// SPDX-License-Identifier: Apache-2.0

//go:build !soak

package main_test

import "time"

const (
	// soakTime is how long TestE2ESoak goes on.
	soakTime = time.Minute
	// soakQcow has the handler qcow killed too. It enters a cluster into its tables before it counts the reference; the
	// host counts what a death in between has left uncounted before it opens the image again.
	soakQcow = false
	// stressTime is how long each setting of the runtime is put under load.
	stressTime = 2 * time.Second
	// mixTime is how long the mixed load goes on.
	mixTime = 16 * time.Second
	// rbdOperations is how many random operations an image in a cluster gets.
	rbdOperations = 1_500
)
