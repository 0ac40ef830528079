// SPDX-License-Identifier: Apache-2.0
//! Integration tests of cvmm, and what they share.
