//! TileState of AMX: up to sixteen rows of 64 bytes, of bf16 numbers when they are factors, of f32 when they are sums.
//!
//! A product of tiles adds to each sum, for each 32 values of `k`, the sum of the even products plus the sum of the odd
//! ones, both rounded at each addition, ascending; subnormal numbers are 0 (Intel's definition of `TDPBF16PS`). Rows of
//! a tile do not meet, so a row has the same sums alone and among others.

use crate::scratch::Vector;
use crate::simd::{LANES, Simd, math};

/// Most rows of a tile.
pub(crate) const TILE_ROWS: usize = 16;
/// Values of `k` in a row of a tile of bf16 numbers.
pub(crate) const TILE_K: usize = 32;
/// Panels that are multiplied at once, and tiles of rows.
pub(crate) const WIDE: usize = 2;
/// Bytes of a full tile.
pub(crate) const TILE_BYTES: usize = 64 * TILE_ROWS;

/// A row of a tile of bf16 numbers, as their bits.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct TileRow(pub(crate) [u16; TILE_K]);

impl TileRow {
    pub(crate) const ZERO: TileRow = TileRow([0; TILE_K]);

    /// Becomes these numbers, rounded.
    #[inline(always)]
    pub(crate) fn round<S: Simd>(&mut self, s: S, numbers: [S::V; 2]) {
        let (first, second) = self.0.split_at_mut(LANES);
        first.copy_from_slice(&math::to_bf16(s, numbers[0]));
        second.copy_from_slice(&math::to_bf16(s, numbers[1]));
    }
}

/// So many rows in pairs of tiles: the first row of each pair, and how many rows its tiles have.
pub(crate) fn pairs(rows: usize) -> impl Iterator<Item = (usize, [usize; 2])> {
    (0..rows)
        .step_by(WIDE * TILE_ROWS)
        .map(move |row| (row, [0, TILE_ROWS].map(|first| (rows - row).saturating_sub(first).min(TILE_ROWS))))
}

/// Fills a tile of weights from the first `k` rows of a bf16 panel, fewer than it has room for, and zeros after them.
/// Beyond those rows the panel may end, or hold anything.
pub(crate) fn copy_rows(panel: &[u8], k: usize, to: &mut [TileRow]) {
    to.fill(TileRow::ZERO);
    for (to, pair) in to.iter_mut().zip(panel.chunks_exact(size_of::<TileRow>()).take(k.div_ceil(2))) {
        to.0.iter_mut().zip(pair.as_chunks().0).for_each(|(to, bytes)| *to = u16::from_ne_bytes(*bytes));
    }
    if k % 2 == 1 {
        // The odd numbers of the last pair lie behind the even ones of each column.
        to[k / 2].0.iter_mut().skip(1).step_by(2).for_each(|odd| *odd = 0);
    }
}

/// Factors and sums of up to two by two products of tiles.
#[derive(Clone, Copy)]
#[cfg_attr(not(all(target_arch = "x86_64", target_os = "linux")), allow(dead_code, reason = "there is no unit"))]
pub(crate) struct Operands {
    /// Rows of the two tiles of activations. The second has none when there is one tile; the first is full otherwise.
    pub(crate) rows: [usize; 2],
    /// The activations: for each tile, one for each step, one behind the other.
    pub(crate) a: [*const TileRow; 2],
    /// The weights: for each panel, one full tile for each step, one behind the other.
    pub(crate) b: [*const u8; 2],
    /// The sums of each panel: the rows of the first tile, then those of the second.
    pub(crate) c: [*mut Vector; 2],
    /// How many tiles there are along `k`, at least one.
    pub(crate) steps: usize,
    /// Weights so many bytes ahead are asked for.
    pub(crate) ahead: Option<usize>,
}

/// What multiplies tiles.
#[derive(Clone, Copy, Debug)]
pub(crate) enum TileUnit {
    /// The CPU's.
    Amx(Amx),
    /// The same in plain Rust.
    #[cfg(test)]
    Emulated,
}

impl TileUnit {
    /// Multiplies and adds.
    ///
    /// # Safety
    /// The operands must be as their fields say, all that they name readable, and the sums writable and nobody else's. No
    /// other [`TileState`] of this thread may be in use.
    pub(crate) unsafe fn multiply(self, tiles: &mut TileState, operands: &Operands) {
        let [first, second] = operands.rows;
        debug_assert!(operands.steps > 0 && (1..=TILE_ROWS).contains(&first) && second <= TILE_ROWS);
        debug_assert!(second == 0 || first == TILE_ROWS);
        match self {
            // SAFETY: what the caller vouches for.
            TileUnit::Amx(amx) => unsafe { amx.multiply(tiles, operands) },
            // SAFETY: as above.
            #[cfg(test)]
            TileUnit::Emulated => unsafe { crate::tests::emulated::multiply(operands) },
        }
    }
}

/// The tiles of a thread, which keep their shape from one product to the next and are given back at the end. Not to be
/// sent to another thread.
pub(crate) struct TileState {
    shape: Option<[usize; 2]>,
    local: std::marker::PhantomData<*const ()>,
}

impl TileState {
    /// TileState that have no shape yet.
    pub(crate) fn new() -> TileState {
        TileState { shape: None, local: std::marker::PhantomData }
    }
}

impl Drop for TileState {
    fn drop(&mut self) {
        if self.shape.is_some() {
            release();
        }
    }
}

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
mod unit {
    use super::{Operands, TileState};

    /// The proof that this CPU and this process have AMX: there is none.
    #[derive(Clone, Copy, Debug)]
    pub(crate) enum Amx {}

    impl Amx {
        pub(crate) fn get() -> Option<Amx> {
            None
        }

        pub(super) unsafe fn multiply(self, _: &mut TileState, _: &Operands) {
            match self {}
        }
    }

    pub(super) fn release() {}
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod unit {
    use std::arch::asm;
    use std::arch::x86_64::__cpuid_count;
    use std::sync::OnceLock;

    use super::{Operands, TILE_ROWS, TileState};

    /// The proof that this CPU has AMX with bf16, and that the kernel lets this process use it.
    #[derive(Clone, Copy, Debug)]
    pub(crate) struct Amx(());

    /// `ARCH_REQ_XCOMP_PERM` of arch_prctl(2): asks for a part of the state that is saved only for who asked.
    const REQUEST_STATE: libc::c_long = 0x1023;
    /// The tiles' data among those parts.
    const TILE_DATA: libc::c_long = 18;
    /// In EDX of CPUID leaf 7: AMX-BF16 and AMX-TILE.
    const FEATURES: u32 = 1 << 22 | 1 << 24;

    /// What `ldtilecfg` reads (Intel SDM, volume 1, 18.3).
    #[repr(C, align(64))]
    struct Config {
        palette: u8,
        start_row: u8,
        reserved: [u8; 14],
        row_bytes: [u16; 16],
        rows: [u8; 16],
    }

    impl Amx {
        /// Asks the CPU and, once, the kernel.
        pub(crate) fn get() -> Option<Amx> {
            static HAS: OnceLock<bool> = OnceLock::new();
            HAS.get_or_init(|| {
                let has = is_x86_feature_detected!("avx512f") && __cpuid_count(7, 0).edx & FEATURES == FEATURES;
                // SAFETY: asks for a permission of this process; no memory is involved.
                has && unsafe { libc::syscall(libc::SYS_arch_prctl, REQUEST_STATE, TILE_DATA) } == 0
            })
            .then_some(Amx(()))
        }

        /// Gives the tiles of this thread their shape: sums are 0 to 3, activations 4 and 5, weights 6 and 7.
        fn shape(self, tiles: &mut TileState, rows: [usize; 2]) {
            // A tile of no rows is no tile; it is not used.
            let [first, second] = rows.map(|rows| rows.clamp(1, TILE_ROWS) as u8);
            let full = TILE_ROWS as u8;
            let mut config = Config { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
            config.row_bytes[..8].fill(64);
            config.rows[..8].copy_from_slice(&[first, first, second, second, first, second, full, full]);
            // SAFETY: `self` proves that the instruction exists; it reads the 64 bytes of `config`. TileState hold nothing
            // that Rust code keeps.
            unsafe {
                asm!("ldtilecfg [{config}]", config = in(reg) &raw const config,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack, readonly, preserves_flags));
            }
            tiles.shape = Some(rows);
        }

        /// See [`super::TileUnit::multiply`].
        ///
        /// # Safety
        /// As there.
        pub(super) unsafe fn multiply(self, tiles: &mut TileState, operands: &Operands) {
            let [first, second] = operands.rows;
            if !tiles.shape.is_some_and(|shape| shape[0] == first && (second == 0 || shape[1] == second)) {
                self.shape(tiles, operands.rows);
            }
            // SAFETY: `self` proves that the instructions exist, the shape is that of the operands, and the caller
            // vouches for their memory. No tile lives beyond one block of instructions.
            unsafe {
                match (operands.rows[1], operands.ahead) {
                    (0, None) => one(operands),
                    (0, Some(ahead)) => one_ahead(operands, ahead),
                    (_, None) => two(operands),
                    (_, Some(ahead)) => two_ahead(operands, ahead),
                }
            }
        }
    }

    /// Frees the tiles, so that the kernel need not save them.
    pub(super) fn release() {
        // SAFETY: only called where `shape` has run, on the same thread.
        unsafe { asm!("tilerelease", options(nostack, nomem, preserves_flags)) }
    }

    /// Asks for the lines of the two tiles of weights that lie `ahead` bytes on.
    macro_rules! prefetches {
        ($($line:literal)*) => {
            concat!($(
                "prefetcht0 [{b0} + {ahead} + ", $line, "]\n",
                "prefetcht0 [{b1} + {ahead} + ", $line, "]\n",
            )*)
        };
    }

    /// A function that loads the sums, goes along `k` and stores the sums; and the same with weights asked for ahead.
    macro_rules! along_k {
        ($name:ident, $ahead_name:ident, $($block:tt)*) => {
            along_k!(@function $name, [], $($block)*);
            along_k!(@function $ahead_name, [ahead], $($block)*);
        };
        (@function $name:ident, [$($ahead:ident)?], [$($load:literal)*], [$($step:literal)*], [$($store:literal)*]) => {
            /// # Safety
            /// See [`Amx::multiply`].
            unsafe fn $name(operands: &Operands $(, $ahead: usize)?) {
                let last = if operands.rows[1] > 0 { operands.rows[1] } else { operands.rows[0] };
                // SAFETY: see `Amx::multiply`.
                unsafe {
                    asm!(
                        $($load,)*
                        "2:",
                        $($step,)*
                        $(along_k!(@prefetch $ahead),)?
                        "add {a0}, {first}",
                        "add {a1}, {last}",
                        "add {b0}, 1024",
                        "add {b1}, 1024",
                        "dec {steps}",
                        "jnz 2b",
                        $($store,)*
                        a0 = inout(reg) operands.a[0] => _,
                        a1 = inout(reg) operands.a[1] => _,
                        b0 = inout(reg) operands.b[0] => _,
                        b1 = inout(reg) operands.b[1] => _,
                        c0 = in(reg) operands.c[0],
                        c1 = in(reg) operands.c[1],
                        steps = inout(reg) operands.steps => _,
                        line = in(reg) 64usize,
                        first = in(reg) 64 * operands.rows[0],
                        last = in(reg) 64 * last,
                        $($ahead = in(reg) $ahead,)?
                        out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                        out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                        options(nostack)
                    );
                }
            }
        };
        (@prefetch $ahead:ident) => {
            prefetches!(0 64 128 192 256 320 384 448 512 576 640 704 768 832 896 960)
        };
    }

    along_k!(
        one,
        one_ahead,
        ["tileloadd tmm0, [{c0} + {line}]" "tileloadd tmm1, [{c1} + {line}]"],
        [
            "tileloadd tmm4, [{a0} + {line}]"
            "tileloadd tmm6, [{b0} + {line}]"
            "tileloadd tmm7, [{b1} + {line}]"
            "tdpbf16ps tmm0, tmm4, tmm6"
            "tdpbf16ps tmm1, tmm4, tmm7"
        ],
        ["tilestored [{c0} + {line}], tmm0" "tilestored [{c1} + {line}], tmm1"]
    );

    along_k!(
        two,
        two_ahead,
        [
            "tileloadd tmm0, [{c0} + {line}]"
            "tileloadd tmm1, [{c1} + {line}]"
            "tileloadd tmm2, [{c0} + {line} + 1024]"
            "tileloadd tmm3, [{c1} + {line} + 1024]"
        ],
        [
            "tileloadd tmm4, [{a0} + {line}]"
            "tileloadd tmm6, [{b0} + {line}]"
            "tileloadd tmm7, [{b1} + {line}]"
            "tileloadd tmm5, [{a1} + {line}]"
            "tdpbf16ps tmm0, tmm4, tmm6"
            "tdpbf16ps tmm1, tmm4, tmm7"
            "tdpbf16ps tmm2, tmm5, tmm6"
            "tdpbf16ps tmm3, tmm5, tmm7"
        ],
        [
            "tilestored [{c0} + {line}], tmm0"
            "tilestored [{c1} + {line}], tmm1"
            "tilestored [{c0} + {line} + 1024], tmm2"
            "tilestored [{c1} + {line} + 1024], tmm3"
        ]
    );
}

pub(crate) use unit::Amx;
use unit::release;
