//! The conversions of every engine, bit for bit against those that any target has, and those against `half`.

use crate::support::engines;
use half::{bf16, f16};
use linattn::simd::convert::{Convert, Generic};
use linattn::simd::{Backend, Kernel, Task};
use linattn::tensor::{Element, Rng};

/// Both directions of one type through the conversions of a backend.
struct Widen<'a, E>(&'a [E], &'a mut [f32]);
struct Narrow<'a, E>(&'a [f32], &'a mut [E]);

macro_rules! entered {
    ($type:ident, $name:ident) => {
        impl<B: Backend, E: Element> Kernel<B> for $type<'_, E> {
            type Output = ();
            #[inline(always)]
            fn run(self, b: B) {
                E::$name(b.convert(), self.0, self.1);
            }
        }
        impl<E: Element> Task for $type<'_, E> {
            type Output = ();
            fn run<B: Backend>(self, b: B) {
                b.call_tiles(self);
            }
        }
    };
}
entered!(Widen, widen);
entered!(Narrow, narrow);

/// A half type whose bits can be told.
trait Half: Element + PartialEq + std::fmt::Debug {
    fn of(bits: u16) -> Self;
    fn bits(self) -> u16;
    fn nan(self) -> bool;
}
macro_rules! half {
    ($($t:ty),*) => {$(
        impl Half for $t {
            fn of(bits: u16) -> Self {
                Self::from_bits(bits)
            }
            fn bits(self) -> u16 {
                self.to_bits()
            }
            fn nan(self) -> bool {
                self.is_nan()
            }
        }
    )*};
}
half!(bf16, f16);

#[track_caller]
fn same_half<E: Half>(x: &[f32], got: &[E], want: &[E], what: &str) {
    for (x, (got, want)) in x.iter().zip(got.iter().zip(want)) {
        let same = got.bits() == want.bits() || x.is_nan() && got.nan() && want.nan();
        let (name, bits) = (E::DTYPE.name(), x.to_bits());
        assert!(same, "{what}: {name} of {bits:#010x}: {got:?} and {want:?}");
        // A NaN keeps its sign.
        assert_eq!(got.bits() >> 15, want.bits() >> 15, "{what}: sign of {name}({bits:#010x})");
    }
}

#[track_caller]
fn same_wide<E: Half>(x: &[E], got: &[f32], want: &[f32], what: &str) {
    for (x, (got, want)) in x.iter().zip(got.iter().zip(want)) {
        let same = got.to_bits() == want.to_bits() || x.nan() && got.is_nan() && want.is_nan();
        assert!(same, "{what}: {:#06x} as {}: {got:e} and {want:e}", x.bits(), E::DTYPE.name());
    }
}

/// The generic form against the scalar conversions of the crate `half`.
#[test]
fn the_generic_form_widens_exactly() {
    fn check<E: Half>(exact: impl Fn(E) -> f32) {
        let x: Vec<E> = (0..=u16::MAX).map(E::of).collect();
        let want: Vec<f32> = x.iter().copied().map(exact).collect();
        let mut got = vec![1.5; x.len()];
        E::widen(Generic, &x, &mut got);
        same_wide(&x, &got, &want, "generic");
    }
    check(bf16::to_f32_const);
    check(f16::to_f32_const);
}

#[test]
fn the_generic_form_rounds_to_nearest_even() {
    fn check<E: Half>(x: &[f32], exact: impl Fn(f32) -> E) {
        let want: Vec<E> = x.iter().copied().map(exact).collect();
        let mut got = vec![E::of(0x1234); x.len()];
        E::narrow(Generic, x, &mut got);
        same_half(x, &got, &want, "generic");
    }
    for low in lower_halves() {
        let x: Vec<f32> = (0..=0xffff).map(|hi| f32::from_bits(hi << 16 | low)).collect();
        check(&x, bf16::from_f32_const);
        check(&x, f16::from_f32_const);
    }
}

#[test]
fn every_half_widens_alike() {
    fn check<E: Half>() {
        let x: Vec<E> = (0..=u16::MAX).map(E::of).collect();
        let mut want = vec![1.5; x.len()];
        E::widen(Generic, &x, &mut want);
        for engine in engines() {
            let mut got = vec![2.5; x.len()];
            engine.runtime().run(Widen(&x, &mut got));
            same_wide(&x, &got, &want, &format!("{engine:?}"));
        }
    }
    check::<bf16>();
    check::<f16>();
}

/// Lower halves of an `f32` at which either type rounds one way or the other: around every power of two.
fn lower_halves() -> Vec<u32> {
    let mut all: Vec<u32> = (0..17u32).map(|s| 1 << s).flat_map(|p| [p - 1, p, p + 1]).collect();
    all.extend([0x0800, 0x2fff, 0x3000, 0x3001, 0x5000, 0x9000, 0xaaaa, 0xe000, 0xf000, 0xfffe]);
    all.retain(|x| *x <= 0xffff);
    all.sort_unstable();
    all.dedup();
    all
}

#[test]
fn edges_narrow_alike() {
    fn check<E: Half>(x: &[f32]) {
        let mut want = vec![E::of(0x1234); x.len()];
        E::narrow(Generic, x, &mut want);
        for engine in engines() {
            let mut got = vec![E::of(0x4321); x.len()];
            engine.runtime().run(Narrow(x, &mut got));
            same_half(x, &got, &want, &format!("{engine:?}"));
        }
    }
    for low in lower_halves() {
        let x: Vec<f32> = (0..=0xffff).map(|hi| f32::from_bits(hi << 16 | low)).collect();
        check::<bf16>(&x);
        check::<f16>(&x);
    }
}

/// What stands at a NaN, an infinity or a subnormal is told without the generic form.
#[test]
fn special_values() {
    let x = [
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::NAN,
        f32::from_bits(0x7f80_0001),
        f32::from_bits(0xff80_0001),
        f32::MAX,
        65519.99,
        65520.0,
        -0.0,
        2f32.powi(-24),
        2f32.powi(-25),
        f32::from_bits(0x0001_0000),
        f32::from_bits(0x8000_8001),
        1.0,
        -2.5,
        0.0,
    ];
    for engine in engines() {
        let (rt, mut b, mut h) = (engine.runtime(), [bf16::ONE; 16], [f16::ONE; 16]);
        rt.run(Narrow(&x, &mut b));
        rt.run(Narrow(&x, &mut h));
        let b: Vec<u16> = b.iter().map(|x| x.to_bits()).collect();
        let h: Vec<u16> = h.iter().map(|x| x.to_bits()).collect();
        let nan = |bits: &[u16], exponent: u16| bits[2..5].iter().all(|x| x & 0x7fff > exponent);
        assert!(nan(&b, 0x7f80) && nan(&h, 0x7c00), "{engine:?}: {b:04x?}, {h:04x?}");
        assert_eq!([b[0], b[1], b[5]], [0x7f80, 0xff80, 0x7f80], "{engine:?}");
        assert_eq!(b[11..13], [0x0001, 0x8001], "{engine:?}: subnormal bf16");
        assert_eq!([h[0], h[1], h[5]], [0x7c00, 0xfc00, 0x7c00], "{engine:?}");
        assert_eq!(h[6..13], [0x7bff, 0x7c00, 0x8000, 0x0001, 0, 0, 0x8000], "{engine:?}");
    }
}

/// Every length, at every alignment, with what lies around the target left as it was.
#[test]
fn nothing_beyond_the_end_is_touched() {
    const ROOM: usize = 160;
    fn check<E: Half>(seed: u64) {
        let (mut rng, mut x) = (Rng::new(seed), vec![0.0; ROOM]);
        rng.fill_normal(&mut x, 3.0);
        let halves: Vec<E> = x.iter().map(|x| E::from_f32(*x)).collect();
        for engine in engines() {
            let rt = engine.runtime();
            for (len, start) in (0..=70).flat_map(|len| (0..5).map(move |at| (len, at))) {
                let (end, what) = (start + len, format!("{engine:?}: {len} from {start}"));
                // The source ends where its allocation does.
                let source = halves[start..end].to_vec();
                let mut wide = vec![f32::from_bits(0x4b4b_4b4b); ROOM];
                rt.run(Widen(&source, &mut wide[start..end]));
                let mut want = vec![0.0; len];
                E::widen(Generic, &source, &mut want);
                same_wide(&source, &wide[start..end], &want, &what);
                let outside = wide[..start].iter().chain(&wide[end..]);
                assert!(outside.clone().all(|x| x.to_bits() == 0x4b4b_4b4b), "{what}: widen");

                let source = x[start..end].to_vec();
                let mut narrow = [E::of(0x4b4b); ROOM];
                rt.run(Narrow(&source, &mut narrow[start..end]));
                let mut want = vec![E::of(0); len];
                E::narrow(Generic, &source, &mut want);
                same_half(&source, &narrow[start..end], &want, &what);
                let outside = narrow[..start].iter().chain(&narrow[end..]);
                assert!(outside.clone().all(|x| x.bits() == 0x4b4b), "{what}: narrow");
            }
        }
    }
    println!("seeds 31 and 32");
    check::<bf16>(31);
    check::<f16>(32);
}

/// Slices of unequal length convert what both hold.
#[test]
fn the_shorter_slice_rules() {
    struct Both<'a>(&'a [bf16], &'a mut [f32], &'a mut [f16]);
    impl<B: Backend> Kernel<B> for Both<'_> {
        type Output = ();
        #[inline(always)]
        fn run(self, b: B) {
            b.convert().widen_bf16(self.0, self.1);
            b.convert().narrow_f16(self.1, self.2);
        }
    }
    impl Task for Both<'_> {
        type Output = ();
        fn run<B: Backend>(self, b: B) {
            b.call_tiles(self);
        }
    }
    for engine in engines() {
        for (a, b, c) in [(37, 50, 20), (50, 37, 60), (3, 40, 41), (40, 3, 2), (0, 4, 9)] {
            let src = vec![bf16::ONE; a];
            let (mut wide, mut narrow) = (vec![2.0; b], vec![f16::NEG_ONE; c]);
            engine.runtime().run(Both(&src, &mut wide, &mut narrow));
            let n = a.min(b);
            assert!(wide[..n].iter().all(|x| *x == 1.0), "{engine:?}");
            assert!(wide[n..].iter().all(|x| *x == 2.0), "{engine:?}");
            for (i, x) in narrow.iter().enumerate() {
                let want = if i < n { 1.0 } else { 2.0 };
                let want = if i < b { want } else { -1.0 };
                assert_eq!(x.to_f32(), want, "{engine:?}: element {i}");
            }
        }
    }
}
