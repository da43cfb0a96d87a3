//! Operands of the AMX engine: elements rounded to `bf16`, or split into two, in the order that tiles are loaded.
//!
//! [`Packing::write`] is compiled for the instructions that it names, and everything else here inlines into it: its
//! callers hold a value that proves them, and it has checked that the operand and its place are as large as they say.

use super::convert::Generic;
use super::storage::Storage;
use super::tiles_amx_parts::{N, Rounding, STEP, exact, transpose, turns, widened};
use core::arch::x86_64::*;
use half::bf16;

/// Rows `stride` apart.
#[derive(Clone, Copy)]
pub struct Rows<'a, E> {
    /// The elements.
    pub data: &'a [E],
    /// Elements from one row to the next.
    pub stride: usize,
}

/// A packed operand, its second parts `plane` behind the first.
pub struct Planes<'a> {
    /// The elements.
    pub data: &'a mut [bf16],
    /// Elements from one part to the next.
    pub plane: usize,
}

/// How an operand is packed.
#[derive(Clone, Copy)]
pub enum Form {
    /// A panel of 32 columns with interleaved row pairs, from `k` rows of `width` columns.
    Pairs,
    /// The same panel from up to 32 columns of `k` elements, each a row of the source.
    Columns,
    /// `m` rows of `k` elements, padded to whole steps.
    Rows,
    /// Those rows where element `(i, p)` is column `i` of source row `p`.
    Transposed,
}

/// An operand, and where it goes.
pub struct Packing<'a, E> {
    /// Its elements.
    pub src: Rows<'a, E>,
    /// One factor per step of the shared dimension, for left operands.
    pub weights: Option<&'a [f32]>,
    /// `k` and `width` of a panel, `m` and `k` of rows.
    pub size: [usize; 2],
    /// Its place.
    pub dst: Planes<'a>,
}

impl<E: Storage> Rows<'_, E> {
    /// Columns `at .. at + 16` of row `r`: all there if `WHOLE`, else zeros from column `width` on.
    ///
    /// # Safety
    /// They lie in the operand.
    #[inline(always)]
    unsafe fn slice<const WHOLE: bool>(&self, r: usize, at: usize, width: usize) -> &[E] {
        let have = if WHOLE { N } else { width.saturating_sub(at).min(N) };
        if have == 0 {
            return &[];
        }
        // SAFETY: as for this function.
        unsafe { core::slice::from_raw_parts(self.data.as_ptr().add(r * self.stride + at), have) }
    }

    /// The same in `f32`.
    ///
    /// # Safety
    /// As for [`slice`](Self::slice).
    #[inline(always)]
    unsafe fn load<const WHOLE: bool>(&self, r: usize, at: usize, width: usize) -> __m512 {
        // SAFETY: as for this function; masks keep to the elements of `s`.
        unsafe {
            let s = self.slice::<WHOLE>(r, at, width);
            if let Some(s) = E::as_f32(s) {
                return _mm512_maskz_loadu_ps(first(s.len()), s.as_ptr());
            }
            let mut x = [0.0; N];
            E::widen(Generic, s, &mut x[..s.len()]);
            _mm512_loadu_ps(x.as_ptr())
        }
    }

    /// The same as it is, of an operand in `bf16`.
    ///
    /// # Safety
    /// As for [`slice`](Self::slice).
    #[inline(always)]
    unsafe fn bits<const WHOLE: bool>(&self, r: usize, at: usize, width: usize) -> Option<__m256i> {
        // SAFETY: as for this function; the mask keeps to the elements of `s`.
        unsafe {
            let s = E::as_bf16(self.slice::<WHOLE>(r, at, width))?;
            Some(_mm256_maskz_loadu_epi16(first(s.len()), s.as_ptr().cast()))
        }
    }
}

/// A mask of the first `n` lanes of 16.
#[inline(always)]
fn first(n: usize) -> u16 {
    (0xffff_u32 >> (N - n)) as u16
}

impl<E: Storage> Packing<'_, E> {
    /// Rounds or splits the operand.
    ///
    /// # Panics
    /// If the operand or its place is too short.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
    pub fn write<const PARTS: usize>(mut self, form: Form) {
        self.check(form, PARTS);
        // SAFETY: checked, and compiled for the instructions.
        unsafe {
            let mut quick = Rounding::<false>::new();
            self.pass::<PARTS, false>(form, &mut quick);
            if !quick.all_finite() {
                self.pass::<PARTS, true>(form, &mut Rounding::new());
            }
        }
    }

    fn check(&self, form: Form, parts: usize) {
        let Self { src, weights, size: [a, b], dst } = self;
        // Rows of the source and their width, elements of one part, and factors.
        let (rows, width, one, factors) = match form {
            Form::Pairs => (*a, *b, a.next_multiple_of(STEP) * STEP, *a),
            Form::Columns => (*b, *a, a.next_multiple_of(STEP) * STEP, *a),
            Form::Rows => (*a, *b, a * b.next_multiple_of(STEP), *b),
            Form::Transposed => (*b, *a, a.next_multiple_of(N) * b.next_multiple_of(STEP), *b),
        };
        let last =
            rows.saturating_sub(1).checked_mul(src.stride).and_then(|n| n.checked_add(width));
        let whole = rows == 0 || width == 0 || last.is_some_and(|n| n <= src.data.len());
        assert!(whole, "operand too short");
        assert!((parts - 1) * dst.plane + one <= dst.data.len(), "no room for an operand");
        assert!(weights.is_none_or(|w| w.len() >= factors), "too few factors");
        let panel = matches!(form, Form::Pairs | Form::Columns);
        assert!(!panel || (b <= &STEP && weights.is_none()), "not a panel");
    }

    #[inline(always)]
    unsafe fn pass<const PARTS: usize, const CAREFUL: bool>(
        &mut self,
        form: Form,
        rounding: &mut Rounding<CAREFUL>,
    ) {
        // SAFETY: `write` has checked.
        unsafe {
            match form {
                Form::Pairs => self.pairs::<PARTS, CAREFUL>(rounding),
                Form::Columns => self.blocks::<PARTS, true, CAREFUL>(rounding),
                Form::Rows => self.rows::<PARTS, CAREFUL>(rounding),
                Form::Transposed => self.blocks::<PARTS, false, CAREFUL>(rounding),
            }
        }
    }

    /// The parts of columns `at .. at + 16` of source rows `r` and `r + 1`, in turn: all there if `WHOLE`, else zeros from
    /// row `k` and column `width` on.
    #[inline(always)]
    unsafe fn pair<const PARTS: usize, const WHOLE: bool, const CAREFUL: bool>(
        &self,
        rounding: &mut Rounding<CAREFUL>,
        [r, k]: [usize; 2],
        [at, width]: [usize; 2],
    ) -> [__m512i; PARTS] {
        // SAFETY: `write` has checked that the rows before `k`, and factors for them, are there.
        unsafe {
            let there = [WHOLE || r < k, WHOLE || r + 1 < k];
            let mut x = [_mm512_setzero_ps(); 2];
            if E::as_bf16(&[]).is_some() {
                let mut rows = [_mm256_setzero_si256(); 2];
                for i in 0..2 {
                    if there[i]
                        && let Some(bits) = self.src.bits::<WHOLE>(r + i, at, width)
                    {
                        rows[i] = bits;
                    }
                }
                let lower = _mm512_castsi256_si512(rows[0]);
                let pair = turns(_mm512_inserti64x4::<1>(lower, rows[1]));
                if self.weights.is_none() {
                    return exact(pair);
                }
                x = widened(pair);
            } else {
                for i in 0..2 {
                    if there[i] {
                        x[i] = self.src.load::<WHOLE>(r + i, at, width);
                    }
                }
            }
            if let Some(w) = self.weights {
                for i in 0..2 {
                    if there[i] {
                        x[i] = _mm512_mul_ps(x[i], _mm512_set1_ps(*w.as_ptr().add(r + i)));
                    }
                }
            }
            rounding.in_turn(x)
        }
    }

    /// The parts of columns `at .. at + 32` of source row `r`: all there if `WHOLE`, else zeros from column `width` on.
    #[inline(always)]
    unsafe fn line<const PARTS: usize, const WHOLE: bool, const CAREFUL: bool>(
        &self,
        rounding: &mut Rounding<CAREFUL>,
        r: usize,
        [at, width]: [usize; 2],
    ) -> [__m512i; PARTS] {
        // SAFETY: `write` has checked that the columns before `width`, and factors for them, are there.
        unsafe {
            let (src, at) = (self.src, [at, at + N]);
            let mut x = [_mm512_setzero_ps(); 2];
            if E::as_bf16(&[]).is_some() {
                let mut bits = [_mm256_setzero_si256(); 2];
                for i in 0..2 {
                    if let Some(x) = src.bits::<WHOLE>(r, at[i], width) {
                        bits[i] = x;
                    }
                }
                if self.weights.is_none() {
                    return exact(_mm512_inserti64x4::<1>(
                        _mm512_castsi256_si512(bits[0]),
                        bits[1],
                    ));
                }
                for i in 0..2 {
                    let wide = _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(bits[i]));
                    x[i] = _mm512_castsi512_ps(wide);
                }
            } else {
                for i in 0..2 {
                    x[i] = src.load::<WHOLE>(r, at[i], width);
                }
            }
            if let Some(data) = self.weights {
                let w = Rows { data, stride: 0 };
                for i in 0..2 {
                    x[i] = _mm512_mul_ps(x[i], w.load::<WHOLE>(0, at[i], width));
                }
            }
            rounding.in_line(x)
        }
    }

    /// Puts 32 elements of a part at `at`.
    #[inline(always)]
    unsafe fn put(&mut self, part: usize, at: usize, x: __m512i) {
        // SAFETY: `write` has checked that all of the operand has room.
        unsafe {
            let to = self.dst.data.as_mut_ptr().add(part * self.dst.plane + at);
            _mm512_storeu_si512(to.cast(), x);
        }
    }

    #[inline(always)]
    unsafe fn pairs<const PARTS: usize, const CAREFUL: bool>(
        &mut self,
        rounding: &mut Rounding<CAREFUL>,
    ) {
        let [k, width] = self.size;
        let whole = if CAREFUL || width < STEP { 0 } else { k / 2 * 2 };
        // SAFETY: as for `row_pair`.
        unsafe {
            for p in (0..whole).step_by(2) {
                self.row_pair::<PARTS, true, CAREFUL>(rounding, p);
            }
            for p in (whole..k.next_multiple_of(STEP)).step_by(2) {
                self.row_pair::<PARTS, false, CAREFUL>(rounding, p);
            }
        }
    }

    /// Rows `p` and `p + 1` of a panel.
    #[inline(always)]
    unsafe fn row_pair<const PARTS: usize, const WHOLE: bool, const CAREFUL: bool>(
        &mut self,
        rounding: &mut Rounding<CAREFUL>,
        p: usize,
    ) {
        let [k, width] = self.size;
        for half in [0, N] {
            // SAFETY: as for `pair` and `put`.
            unsafe {
                let x = self.pair::<PARTS, WHOLE, CAREFUL>(rounding, [p, k], [half, width]);
                for part in 0..PARTS {
                    self.put(part, p * STEP + 2 * half, x[part]);
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn rows<const PARTS: usize, const CAREFUL: bool>(
        &mut self,
        rounding: &mut Rounding<CAREFUL>,
    ) {
        let [m, k] = self.size;
        let stride = k.next_multiple_of(STEP);
        for i in 0..m {
            for p in (0..k).step_by(STEP) {
                // SAFETY: as for `line` and `put`.
                unsafe {
                    let x = if !CAREFUL && p + STEP <= k {
                        self.line::<PARTS, true, CAREFUL>(rounding, i, [p, k])
                    } else {
                        self.line::<PARTS, false, CAREFUL>(rounding, i, [p, k])
                    };
                    for part in 0..PARTS {
                        self.put(part, i * stride + p, x[part]);
                    }
                }
            }
        }
    }

    /// What is transposed on the way, of [`Form::Columns`] if `PANEL`, of [`Form::Transposed`] if not.
    #[inline(always)]
    unsafe fn blocks<const PARTS: usize, const PANEL: bool, const CAREFUL: bool>(
        &mut self,
        rounding: &mut Rounding<CAREFUL>,
    ) {
        let [a, b] = self.size;
        // Both halves of a panel are written, however narrow it is.
        let (n, k, all) = if PANEL { (b, a, STEP) } else { (a, b, a) };
        for i in (0..all).step_by(N) {
            for p in (0..k).step_by(STEP) {
                // SAFETY: as for `block`.
                unsafe {
                    if !CAREFUL && i + N <= n && p + STEP <= k {
                        self.block::<PARTS, PANEL, true, CAREFUL>(rounding, [i, n], [p, k]);
                    } else {
                        self.block::<PARTS, PANEL, false, CAREFUL>(rounding, [i, n], [p, k]);
                    }
                }
            }
        }
    }

    /// Steps `p .. p + 32` of `k`, of columns or rows `i .. i + 16` of `n`.
    #[inline(always)]
    unsafe fn block<
        const PARTS: usize,
        const PANEL: bool,
        const WHOLE: bool,
        const CAREFUL: bool,
    >(
        &mut self,
        rounding: &mut Rounding<CAREFUL>,
        [i, n]: [usize; 2],
        [p, k]: [usize; 2],
    ) {
        // SAFETY: as for `line`, `pair` and `put`.
        unsafe {
            let mut x = [[_mm512_setzero_si512(); N]; PARTS];
            for r in 0..N {
                let parts = if !PANEL {
                    self.pair::<PARTS, WHOLE, CAREFUL>(rounding, [p + 2 * r, k], [i, n])
                } else if WHOLE || i + r < n {
                    self.line::<PARTS, WHOLE, CAREFUL>(rounding, i + r, [p, k])
                } else {
                    continue;
                };
                for part in 0..PARTS {
                    x[part][r] = parts[part];
                }
            }
            let stride = k.next_multiple_of(STEP);
            for part in 0..PARTS {
                let x = transpose(x[part]);
                for r in 0..N {
                    let at = if PANEL { (p + 2 * r) * STEP + 2 * i } else { (i + r) * stride + p };
                    self.put(part, at, x[r]);
                }
            }
        }
    }
}
