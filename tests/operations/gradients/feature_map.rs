//! Backward pass of feature maps.

use crate::support::{isas, normal, runtime};
use half::{bf16, f16};
use linattn::kernels::feature_map::{FeatureMap, chain_rows};
use linattn::simd::{Backend, Kernel, Task};
use linattn::tensor::{Element, Rng, View, ViewMut};

const MAPS: [FeatureMap; 4] =
    [FeatureMap::Identity, FeatureMap::Elu1, FeatureMap::Relu, FeatureMap::Silu];

struct Chain<'a, E> {
    map: FeatureMap,
    x: View<'a, E, 2>,
    dphi: &'a [f32],
    stride: usize,
    out: ViewMut<'a, E, 2>,
}

impl<B: Backend, E: Element> Kernel<B> for Chain<'_, E> {
    type Output = ();
    #[inline(always)]
    fn run(mut self, b: B) {
        let rows = [1, self.x.shape()[0] - 1];
        chain_rows(b, self.map, self.x, rows, self.dphi, self.stride, &mut self.out);
    }
}

impl<E: Element> Task for Chain<'_, E> {
    type Output = ();
    fn run<B: Backend>(self, b: B) {
        b.call(self);
    }
}

#[test]
fn slopes_are_those_of_the_maps() {
    let step = 1e-6;
    for map in MAPS {
        for i in -60..60 {
            let x = f64::from(i) * 0.3 + 0.1;
            let difference = (map.at(x + step) - map.at(x - step)) / (2.0 * step);
            let error = (map.slope(x) - difference).abs();
            assert!(error <= 1e-8 * difference.abs().max(1.0), "{map:?} at {x}: off by {error:e}");
        }
        assert_eq!(map.slope(0.0), [1.0, 1.0, 0.0, 0.5][map as usize], "{map:?} at 0");
    }
}

fn chained<E: Element>(width: usize, tolerance: f64) {
    const ROWS: usize = 3;
    let (mut rng, stride) = (Rng::new(width as u64), width + 3);
    let mut x: Vec<E> =
        normal(&mut rng, ROWS * width).iter().map(|x| E::from_f32(3.0 * x)).collect();
    x[width] = E::from_f32(0.0);
    let dphi = normal(&mut rng, (ROWS - 2) * stride + width);
    for isa in isas() {
        for map in MAPS {
            let mut out = vec![E::from_f32(f32::NAN); ROWS * width];
            runtime(isa).run(Chain {
                map,
                x: View::new(&x, [ROWS, width]).expect("rows"),
                dphi: &dphi,
                stride,
                out: ViewMut::new(&mut out, [ROWS, width]).expect("rows"),
            });
            assert!(out[..width].iter().all(|y| y.to_f32().is_nan()), "a row before the first");
            for (i, (x, y)) in x.iter().zip(&out).enumerate().skip(width) {
                let d = f64::from(dphi[(i / width - 1) * stride + i % width]);
                let want = map.slope(f64::from(x.to_f32())) * d;
                let error = (f64::from(y.to_f32()) - want).abs();
                assert!(
                    error <= tolerance * d.abs().max(1e-3),
                    "{isa} {map:?} {}: element {i} of width {width} is {} instead of {want}",
                    E::DTYPE.name(),
                    y.to_f32()
                );
            }
        }
    }
}

#[test]
fn rows_are_chained() {
    for width in (1..=18).chain([64, 65, 100]) {
        chained::<f32>(width, 1e-6);
    }
    chained::<bf16>(77, 4e-3);
    chained::<f16>(77, 6e-4);
}

#[test]
fn slopes_have_limits() {
    let x = [0.0, f32::NEG_INFINITY, f32::INFINITY, -1e30, 1e30, f32::NAN];
    for (isa, map) in isas().into_iter().flat_map(|isa| MAPS.map(|map| (isa, map))) {
        // The first of two rows is skipped.
        let (both, mut out) = ([x, x].concat(), [0.0; 12]);
        runtime(isa).run(Chain {
            map,
            x: View::new(&both, [2, 6]).expect("rows"),
            dphi: &[2.0; 6],
            stride: 6,
            out: ViewMut::new(&mut out, [2, 6]).expect("rows"),
        });
        for (x, y) in x.iter().zip(&out[6..]).skip(1).take(4) {
            let low = if map == FeatureMap::Identity { 2.0 } else { 0.0 };
            let want = if *x > 0.0 { 2.0 } else { low };
            assert_eq!(*y, want, "{isa} {map:?} at {x}");
        }
        let nan = out[11].is_nan() || matches!(map, FeatureMap::Identity | FeatureMap::Relu);
        assert!(nan, "{isa} {map:?} at NaN: {}", out[11]);
    }
}
