//! Matrix products at chunk and layer sizes, right side packed or not.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use linattn::kernels::gemm::{matmul, matmul_bytes, output};
use linattn::kernels::store::Store;
use linattn::scratch::Cut;
use linattn::simd::{Backend, Left, Order, Source, Task};
use linattn::tensor::{Rng, Tensor};
use linattn::{Isa, Runtime};

struct Product<'a, 'c> {
    shape: [usize; 3],
    group: &'a mut criterion::BenchmarkGroup<'c, criterion::measurement::WallTime>,
}

impl Task for Product<'_, '_> {
    type Output = ();
    fn run<B: Backend>(self, b: B) {
        let [m, k, n] = self.shape;
        let mut rng = Rng::new(1);
        let mut make = |len| {
            let mut t = Tensor::<1>::zeros([len]).expect("operand");
            rng.fill_normal(t.as_mut_slice(), 1.0);
            t
        };
        let (a, w, mut c) = (make(m * k), make(k * n), make(m * n));
        let mut scratch = make(matmul_bytes::<B::T>(m, k, n).div_ceil(4));
        let scratch: &mut [u8] = bytemuck::cast_slice_mut(scratch.as_mut_slice());
        self.group.throughput(Throughput::Elements(2 * (m * k * n) as u64));
        self.group.bench_function(BenchmarkId::new(B::NAME, format!("{m}x{k}x{n}")), |bench| {
            bench.iter(|| {
                let left = Left::new(a.as_slice(), Order::Rows(k));
                let store = Store::new(output(c.as_mut_slice(), m, n));
                matmul(
                    b,
                    b.tiles(),
                    [m, k, n],
                    left,
                    Source::Rows(w.as_slice(), n),
                    store,
                    &mut Cut::new(scratch),
                );
            });
        });
    }
}

fn gemm(c: &mut Criterion) {
    let mut group = c.benchmark_group("gemm");
    for isa in Isa::detected().filter(|i| *i != Isa::Amx) {
        let rt = Runtime::builder().isa(isa).threads(1).build().expect("detected");
        for shape in
            [[64, 64, 64], [128, 128, 128], [256, 128, 256], [1, 1024, 2816], [1024, 1024, 1024]]
        {
            rt.run(Product { shape, group: &mut group });
        }
    }
    group.finish();
}

criterion_group!(benches, gemm);
criterion_main!(benches);
