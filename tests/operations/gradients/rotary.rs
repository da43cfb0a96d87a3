//! Positions: what is linear and, for RoPE, a rotation.

use super::difference::close;
use crate::laid::{Laid, ORDERS};
use crate::support::{bits, isas, normal, runtime, with_threads};
use linattn::layers::{Lrpe, Positions, Rope, RopeStyle};
use linattn::tensor::{Rng, View, ViewMut};
use linattn::{Error, Runtime};

const SHAPE: [usize; 4] = [2, 5, 3, 22];

#[test]
fn rope_turns_back() {
    let mut rng = Rng::new(3);
    let dout = normal(&mut rng, SHAPE.iter().product());
    let at = [7, 0, 123_456, 3, 3];
    for isa in isas() {
        let rt = runtime(isa);
        for (style, order) in
            [RopeStyle::Half, RopeStyle::Interleaved].iter().flat_map(|s| ORDERS.map(|o| (*s, o)))
        {
            for (rot, positions) in [(22, Positions::From(1000)), (14, Positions::At(&at))] {
                let rope = Rope::new(style, rot, 1e4).expect("a rotation");
                let (from, mut to) =
                    (Laid::<f32>::new(&dout, SHAPE, order), Laid::new(&dout, SHAPE, order));
                rope.backward(&rt, positions, from.view(), to.view_mut()).expect("a good call");
                let got = to.take();
                // The transpose of a rotation by the definition.
                let mut want: Vec<f64> = dout.iter().copied().map(f64::from).collect();
                for (r, row) in want.chunks_exact_mut(SHAPE[3]).enumerate() {
                    let t = r / SHAPE[2] % SHAPE[1];
                    let p = match positions {
                        Positions::From(start) => start + t,
                        Positions::At(at) => at[t],
                    };
                    for i in 0..rot / 2 {
                        let angle = p as f64 * 1e4f64.powf(-2.0 * i as f64 / rot as f64);
                        let (a, b) = match style {
                            RopeStyle::Half => (i, i + rot / 2),
                            RopeStyle::Interleaved => (2 * i, 2 * i + 1),
                        };
                        let (x, y, s, c) = (row[a], row[b], angle.sin(), angle.cos());
                        (row[a], row[b]) = (x * c + y * s, y * c - x * s);
                    }
                }
                close(&got, &want, 1e-6, &format!("{isa} {style:?} {order:?} {rot}"));
            }
        }
    }
}

#[test]
fn lrpe_sums_both_halves() {
    let [batch, len, heads, dim] = SHAPE;
    let mut rng = Rng::new(4);
    let wide = [batch, len, heads, 2 * dim];
    let dout = normal(&mut rng, wide.iter().product());
    let theta = normal(&mut rng, heads * dim);
    let lrpe = Lrpe::new(View::new(&theta, [heads, dim]).expect("angles")).expect("an encoding");
    let mut want = Vec::new();
    for (r, row) in dout.chunks_exact(2 * dim).enumerate() {
        let (t, h) = (r / heads % len, r % heads);
        for j in 0..dim {
            let angle = f64::from(theta[h * dim + j]) * (50_000 + t) as f64;
            let (a, b) = (f64::from(row[j]), f64::from(row[dim + j]));
            want.push(a * angle.cos() + b * angle.sin());
        }
    }
    for (isa, order) in isas().into_iter().flat_map(|isa| ORDERS.map(|o| (isa, o))) {
        let (from, mut to) =
            (Laid::<f32>::new(&dout, wide, order), Laid::new(&[0.0; 660], SHAPE, order));
        let rt = runtime(isa);
        lrpe.backward(&rt, 50_000, from.view(), to.view_mut()).expect("a good call");
        close(&to.take(), &want, 1e-6, &format!("{isa} {order:?}"));
    }
}

#[test]
fn angles_add_up_over_tokens() {
    let [batch, len, heads, dim] = [2, 300, 3, 70];
    let (shape, wide) = ([batch, len, heads, dim], [batch, len, heads, 2 * dim]);
    let mut rng = Rng::new(6);
    let [x, dout] = [shape, wide].map(|s| normal(&mut rng, s.iter().product()));
    let theta = normal(&mut rng, heads * dim);
    let lrpe = Lrpe::new(View::new(&theta, [heads, dim]).expect("angles")).expect("an encoding");
    let mut want = vec![0.0; heads * dim];
    for (r, (x, dout)) in x.chunks_exact(dim).zip(dout.chunks_exact(2 * dim)).enumerate() {
        let (p, h) = ((7 + r / heads % len) as f64, r % heads);
        for j in 0..dim {
            let angle = f64::from(theta[h * dim + j]) * p;
            let [x, a, b] = [x[j], dout[j], dout[dim + j]].map(f64::from);
            want[h * dim + j] += p * x * (angle.cos() * b - angle.sin() * a);
        }
    }
    for (isa, order) in isas().into_iter().flat_map(|isa| ORDERS.map(|o| (isa, o))) {
        let (x, dout) = (Laid::<f32>::new(&x, shape, order), Laid::new(&dout, wide, order));
        let [one, two] = [1, 2].map(|threads| {
            let mut got = vec![f32::NAN; heads * dim];
            let to = ViewMut::new(&mut got, [heads, dim]).expect("a tensor");
            let rt = with_threads(isa, Some(threads));
            lrpe.backward_angles(&rt, x.view(), 7, dout.view(), to).expect("a good call");
            got
        });
        close(&one, &want, 1e-6, &format!("{isa} {order:?}"));
        assert_eq!(bits(&one), bits(&two), "{isa} {order:?}");
    }
}

#[test]
fn threads_do_not_matter() {
    let shape = [1, 300, 4, 64];
    let dout = normal(&mut Rng::new(5), shape.iter().product());
    let rope = Rope::new(RopeStyle::Half, 64, 1e4).expect("a rotation");
    for isa in isas() {
        let [one, three] = [1, 3].map(|n| {
            let mut dx = vec![0.0; dout.len()];
            let view = View::new(&dout, shape).expect("a tensor");
            let out = ViewMut::new(&mut dx, shape).expect("a tensor");
            let rt = with_threads(isa, Some(n));
            rope.backward(&rt, Positions::From(9), view, out).expect("a good call");
            dx
        });
        assert_eq!(bits(&one), bits(&three), "{isa}");
    }
}

#[test]
fn wrong_calls_write_nothing() {
    let rt = Runtime::new().expect("a runtime");
    let (dout, mut dx) = ([1.0; 8], [f32::NAN; 8]);
    let from = View::new(&dout, [1, 2, 1, 4]).expect("a tensor");
    let rope = Rope::new(RopeStyle::Half, 4, 1e4).expect("a rotation");
    let theta = View::new(&[0.5, 0.25], [1, 2]).expect("angles");
    let lrpe = Lrpe::new(theta).expect("an encoding");
    let errors = [([1, 1, 2, 4], 0), ([1, 2, 1, 2], usize::MAX), ([1, 2, 1, 4], 0)].map(
        |(shape, offset)| {
            let mut to = ViewMut::new(&mut dx[..shape.iter().product()], shape).expect("a tensor");
            let positions =
                if shape[3] == 4 { Positions::At(&[0]) } else { Positions::From(offset) };
            let turn = rope.backward(&rt, positions, from, to.reborrow()).expect_err("rope");
            (turn, lrpe.backward(&rt, offset, from, to).expect_err("lrpe"))
        },
    );
    let [(rope_shape, lrpe_shape), (narrow, far), (few, wide)] = errors;
    for (err, expected) in
        [(rope_shape, "dx"), (lrpe_shape, "dx"), (narrow, "dx"), (few, "positions"), (wide, "dx")]
    {
        assert!(matches!(err, Error::Shape { arg, .. } if arg == expected), "{err}");
    }
    assert!(matches!(far, Error::Value { arg: "offset", .. }), "{far}");
    assert!(dx.iter().all(|x| x.is_nan()), "something was written");
}
