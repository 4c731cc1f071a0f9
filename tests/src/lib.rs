//! Tests that cross crates and need no cluster.
