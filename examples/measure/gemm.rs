//! Matrix products.

use crate::{Args, Outcome, timing};
use linattn::Runtime;
use linattn::kernels::gemm::{
    Gemm, Pack, gemm as product, gemm_bytes, matmul, matmul_bytes, output,
};
use linattn::kernels::store::Store;
use linattn::scratch::Cut;
use linattn::simd::{Backend, Left, Order, Source, Task, Tiles};
use linattn::tensor::{Rng, Tensor};

struct Time<'a>(&'a Args, &'a Runtime);

impl Task for Time<'_> {
    type Output = Outcome;
    fn run<B: Backend>(self, b: B) -> Outcome {
        let Args { m, k, n, .. } = *self.0;
        let mut rng = Rng::new(self.0.seed);
        let mut make = |len| {
            let mut t = Tensor::<1>::zeros([len]).expect("operand");
            rng.fill_normal(t.as_mut_slice(), 1.0);
            t
        };
        let (a, w) = (make(m * k), make(k * n));
        let (a, w) = (a.as_slice(), w.as_slice());
        let mut c = vec![0.0f32; m * n];
        let left = Left::new(a, Order::Rows(k));
        let words = (matmul_bytes::<B::T>(m, k, n) + gemm_bytes::<B::T>(m, k)).div_ceil(4);
        let mut scratch = Tensor::<1>::zeros([words + 16]).expect("scratch");
        let scratch: &mut [u8] = bytemuck::cast_slice_mut(scratch.as_mut_slice());
        let times = if self.0.packed {
            let mut panels = Tensor::<1>::zeros([B::T::right_len(k, n)]).expect("panels");
            let dst: &mut [<B::T as Tiles>::Elem] = bytemuck::cast_slice_mut(panels.as_mut_slice());
            b.call(Pack { tiles: b.tiles(), src: Source::Rows(w, n), k, n, dst: &mut *dst });
            let right = B::T::right(dst, k);
            timing::measure(self.0, self.1, || {
                let store = Store::new(output(&mut c, m, n));
                product(b, b.tiles(), Gemm { m, k, n, left, right, store }, &mut Cut::new(scratch));
            })
        } else {
            timing::measure(self.0, self.1, || {
                let store = Store::new(output(&mut c, m, n));
                matmul(
                    b,
                    b.tiles(),
                    [m, k, n],
                    left,
                    Source::Rows(w, n),
                    store,
                    &mut Cut::new(scratch),
                );
            })
        };
        let error = self.0.check.then(|| {
            let want: Vec<f64> = (0..m * n)
                .map(|at| {
                    (0..k)
                        .map(|p| f64::from(a[at / n * k + p]) * f64::from(w[p * n + at % n]))
                        .sum()
                })
                .collect();
            (timing::relative(&c, &want), 1e-5)
        });
        let mut extra = serde_json::Map::new();
        extra.insert("m".into(), m.into());
        extra.insert("k".into(), k.into());
        extra.insert("packed".into(), self.0.packed.into());
        Outcome { times, flops: 2.0 * (m * n * k) as f64, error, extra, ..Outcome::default() }
    }
}

/// `m x k` times `k x n`.
pub fn gemm(args: &Args, rt: &Runtime) -> Outcome {
    rt.run(Time(args, rt))
}
