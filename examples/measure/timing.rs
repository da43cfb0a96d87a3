//! Clocks, pinning and calibration.

use crate::Args;
use linattn::Runtime;
use linattn::simd::{Backend, Kernel, Lanes, Task};
use std::hint::black_box;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// Restricts a single-threaded run to one core, as the peers do.
pub fn pin(threads: usize, core: i32) {
    if threads != 1 || core < 0 {
        return;
    }
    // A core that does not exist leaves the process where it is.
    if let Some(id) = core_affinity::get_core_ids().and_then(|ids| ids.get(core as usize).copied())
    {
        core_affinity::set_for_current(id);
    }
}

/// Ceilings seen between repetitions: clocks change with the instructions that ran just before.
#[derive(Clone, Debug, Default)]
pub struct Calibration(Arc<Mutex<Vec<f64>>>);

impl Calibration {
    /// The median rate of multiply-adds from registers.
    pub fn fma_gflops(&self) -> f64 {
        let mut rates = self.rates().clone();
        rates.sort_by(f64::total_cmp);
        rates.get(rates.len() / 2).copied().unwrap_or(0.0)
    }

    fn rates(&self) -> MutexGuard<'_, Vec<f64>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Seconds per call, one entry per repetition: warm-up, then repetitions of enough calls to last `min_time`, each
/// followed by a short calibration.
pub fn measure(args: &Args, rt: &Runtime, mut call: impl FnMut()) -> Vec<f64> {
    call();
    let start = Instant::now();
    call();
    let once = start.elapsed().as_secs_f64().max(1e-9);
    let calls = ((args.min_time / once) as usize).max(1);
    (0..args.reps.max(1))
        .map(|_| {
            let start = Instant::now();
            for _ in 0..calls {
                call();
            }
            let seconds = start.elapsed().as_secs_f64() / calls as f64;
            let rate = rt.run(Peak);
            args.calibration.rates().push(rate);
            seconds
        })
        .collect()
}

struct Fma(usize);

impl<B: Backend> Kernel<B> for Fma {
    type Output = f32;
    #[inline(always)]
    fn run(self, b: B) -> f32 {
        let l = b.lanes();
        let (x, y) = (l.splat(black_box(0.5)), l.splat(black_box(0.25)));
        // As many independent chains as hide the latency of two units, few enough for sixteen registers.
        let mut acc = [l.zero(); 12];
        for _ in 0..self.0 {
            for a in &mut acc {
                *a = l.mul_add(*a, x, y);
            }
        }
        let mut sum = l.zero();
        for a in acc {
            sum = l.add(sum, a);
        }
        l.sum(sum)
    }
}

struct Peak;

impl Task for Peak {
    type Output = f64;
    fn run<B: Backend>(self, b: B) -> f64 {
        const STEPS: usize = 100_000;
        let flops = (2 * 12 * B::L::N * STEPS) as f64;
        let once = || {
            let start = Instant::now();
            black_box(b.call(Fma(black_box(STEPS))));
            flops / start.elapsed().as_secs_f64() / 1e9
        };
        let mut rates: Vec<f64> = (0..9).map(|_| once()).collect();
        rates.sort_by(f64::total_cmp);
        rates[rates.len() / 2]
    }
}

/// Relative L2 distance.
pub fn relative(got: &[f32], want: &[f64]) -> f64 {
    let (mut num, mut den) = (0.0, 0.0);
    for (g, w) in got.iter().zip(want) {
        num += (f64::from(*g) - w).powi(2);
        den += w * w;
    }
    (num / den).sqrt()
}
