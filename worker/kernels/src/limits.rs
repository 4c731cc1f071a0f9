//! What the machine allows: the yardsticks that rates of kernels are held against.

use crate::Cpu;
use crate::simd::{Kernel, Simd};

/// Bytes of a piece that one thread reads.
const PIECE: usize = 1 << 20;
/// How far ahead of the reads memory is asked for.
const AHEAD: usize = 2048;

/// Reads all of `bytes` once on all threads, as fast as loads allow: two streams a thread, prefetched. The result
/// depends on the bytes, so that nothing is left out. What does not fill a cache line at the end of a piece is skipped.
pub fn read(cpu: &Cpu, bytes: &[u8]) -> f32 {
    let largest = std::sync::atomic::AtomicU32::new(0);
    cpu.pool().run(bytes.len().div_ceil(PIECE), |piece| {
        let piece = &bytes[piece * PIECE..bytes.len().min((piece + 1) * PIECE)];
        largest.fetch_max(cpu.dispatch(Read { bytes: piece }).to_bits(), std::sync::atomic::Ordering::Relaxed);
    });
    f32::from_bits(largest.into_inner())
}

/// Does 2 · 16 · `chains(cpu)` · `rounds` floating-point operations on each thread, in registers.
pub fn multiply(cpu: &Cpu, rounds: usize) {
    cpu.pool().run(cpu.threads(), |_| {
        std::hint::black_box(cpu.dispatch(Multiply { rounds }));
    });
}

/// Independent vectors of sixteen that [`multiply`] works on in each round.
pub fn chains(cpu: &Cpu) -> usize {
    cpu.dispatch(Chains)
}

struct Read<'a> {
    bytes: &'a [u8],
}

impl Kernel for Read<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let (lines, _) = self.bytes.as_chunks::<64>();
        let (first, second) = lines.split_at(lines.len() / 2);
        let mut largest = [s.splat(0.0); 4];
        for (x, y) in first.as_chunks::<2>().0.iter().zip(second.as_chunks::<2>().0) {
            for (i, line) in x.iter().chain(y).enumerate() {
                s.prefetch(line.as_ptr().wrapping_add(AHEAD));
                // SAFETY: a line is 64 bytes.
                largest[i] = s.max(unsafe { s.load_f32(line.as_ptr()) }, largest[i]);
            }
        }
        s.largest(s.max(s.max(largest[0], largest[1]), s.max(largest[2], largest[3])))
    }
}

struct Multiply {
    rounds: usize,
}

impl Kernel for Multiply {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let (factor, term) = (s.splat(0.999_999), s.splat(1e-6));
        let mut values = [s.splat(1.0); MOST_CHAINS];
        for _ in 0..self.rounds {
            for value in &mut values[..S::ROWS] {
                *value = s.fma(*value, factor, term);
            }
        }
        let mut sum = s.splat(0.0);
        for value in values {
            sum = s.add(sum, value);
        }
        s.sum(sum)
    }
}

struct Chains;

impl Kernel for Chains {
    type Output = usize;

    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> usize {
        S::ROWS
    }
}

const MOST_CHAINS: usize = 8;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Level;

    #[test]
    fn every_line_is_read_at_every_level() {
        for level in Level::available() {
            let cpu = Cpu::new(level, 2).expect("an available level");
            let mut bytes = vec![0u8; 3 * PIECE + 512];
            for at in [0, 60, PIECE - 4, PIECE, 3 * PIECE + 508] {
                bytes[at..at + 4].copy_from_slice(&7.0f32.to_ne_bytes());
                assert_eq!(read(&cpu, &bytes), 7.0, "{at}");
                bytes[at..at + 4].fill(0);
            }
            assert_eq!(read(&cpu, &bytes), 0.0);
            multiply(&cpu, 10);
            assert!(chains(&cpu) > 0);
        }
    }
}
