// SPDX-License-Identifier: Apache-2.0

package shared

// pause tells the processor that this is a spin loop.
func pause()
