// SPDX-License-Identifier: Apache-2.0

//go:build soak

package main_test

import "time"

const (
	// soakTime is how long TestE2ESoak goes on.
	soakTime = 10 * time.Minute
	// soakQcow has the handler qcow killed too. It enters a cluster into its tables before it counts the reference: a
	// death between the two leaves an image in which the cluster is handed out once more.
	soakQcow = true
	// rbdOperations is how many random operations an image in a cluster gets.
	rbdOperations = 1_000_000
)
