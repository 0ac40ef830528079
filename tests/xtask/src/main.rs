// SPDX-License-Identifier: Apache-2.0
//! The door for every chore of the project.

fn main() {}
