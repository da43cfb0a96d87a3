//! Long streams: errors do not grow, nothing grows, and silence leaves nothing subnormal behind.

use crate::support::{isas, rel_err, runtime};
use linattn::Runtime;
use linattn::attention::State;
use linattn::attention::lightning::{LightningAttention, naive};
use linattn::tensor::{Rng, View, ViewMut};

const DIM: usize = 16;
/// Steep, gentle, nearly none, none.
const SLOPES: [f64; 4] = [0.5, 1e-3, 1e-5, 0.0];
/// Tokens at the end that are compared.
const LAST: usize = 1000;

/// Feeds `len` random tokens in parts of changing length; errors of the last outputs, per head.
fn stream(rt: &Runtime, len: usize) -> [f64; 4] {
    let h = SLOPES.len();
    let (seed, parts) = (3, [1, 64, 63, 1, 257, 128, 2, 500]);
    println!("seed {seed}");
    let mut rng = Rng::new(seed);
    let op = LightningAttention::new(&SLOPES).expect("slopes");
    let mut state = State::new(1, h, DIM, DIM).expect("a state");
    let bytes = state.bytes();
    let mut exact = vec![vec![0.0; DIM * DIM]; h];
    let (mut got, mut want) = (vec![Vec::new(); h], vec![Vec::new(); h]);
    let (mut at, mut parts) = (0, parts.into_iter().cycle());
    while at < len {
        let n = parts.next().expect("a cycle").min(len - at);
        let mut numbers =
            || -> Vec<f32> { (0..n * h * DIM).map(|_| 0.5 + 0.5 * rng.normal()).collect() };
        let [q, k, v] = [numbers(), numbers(), numbers()];
        let mut out = vec![f32::NAN; q.len()];
        let [a, b, c] = [&q, &k, &v].map(|x| View::new(x, [1, n, h, DIM]).expect("a tensor"));
        let to = ViewMut::new(&mut out, [1, n, h, DIM]).expect("a tensor");
        op.forward(rt, a, b, c, to, &mut state).expect("a good call");
        for (head, slope) in SLOPES.into_iter().enumerate() {
            let rows = |x: &[f32]| -> Vec<f64> {
                let rows = x.chunks_exact(DIM).skip(head).step_by(h);
                rows.flatten().map(|x| f64::from(*x)).collect()
            };
            let [q, k, v] = [&q, &k, &v].map(|x| rows(x));
            let o = naive::head(&q, &k, &v, [DIM; 2], slope, 1.0, &mut exact[head]);
            if at + n > len - LAST {
                want[head].extend(o);
                got[head].extend(rows(&out).into_iter().map(|x| x as f32));
            }
        }
        at += n;
    }
    assert_eq!((state.len(), state.bytes()), (len, bytes), "a state of one size");
    std::array::from_fn(|h| rel_err(&got[h], &want[h]))
}

fn check(long: usize) {
    for isa in isas() {
        let rt = runtime(isa);
        let (short, long) = (stream(&rt, 10_000), stream(&rt, long));
        let show = |errors: [f64; 4]| errors.map(|e| format!("{e:.1e}")).join(", ");
        println!("{isa}: {} after 10000 tokens, {} at the end", show(short), show(long));
        for (i, bound) in [1e-6, 1e-6, 5e-5, 5e-5].into_iter().enumerate() {
            assert!(long[i] <= bound, "{isa}: slope {}: {:.1e}", SLOPES[i], long[i]);
            if SLOPES[i] >= 1e-3 {
                let grows = long[i] / short[i];
                assert!(grows <= 1.5, "{isa}: slope {}: the error grows {grows}", SLOPES[i]);
            }
        }
    }
}

#[test]
fn errors_do_not_grow() {
    check(if cfg!(target_arch = "aarch64") { 12_000 } else { 40_000 });
}

#[test]
#[ignore = "a million tokens take a while"]
fn errors_do_not_grow_in_a_million_tokens() {
    check(1_000_000);
}

#[test]
fn silence_leaves_nothing_subnormal() {
    let (h, len) = (3, 1000);
    let op = LightningAttention::new(&[0.5, 0.1, 0.69]).expect("slopes");
    let numbers: Vec<f32> = (0..len * h * DIM).map(|i| (i as f32).sin()).collect();
    let zeros = vec![0.0; numbers.len()];
    for isa in isas() {
        let rt = runtime(isa);
        let mut state = State::new(1, h, DIM, DIM).expect("a state");
        let mut feed = |x: &[f32], n: usize| {
            let mut out = vec![f32::NAN; n * h * DIM];
            let x = View::new(&x[..out.len()], [1, n, h, DIM]).expect("a tensor");
            let to = ViewMut::new(&mut out, [1, n, h, DIM]).expect("a tensor");
            op.forward(&rt, x, x, x, to, &mut state).expect("a good call");
            let all = state.view().as_slice().expect("a whole state").iter().chain(&out);
            assert!(all.into_iter().all(|x| !x.is_subnormal()), "{isa}: a subnormal number");
        };
        feed(&numbers, len);
        (0..4000).for_each(|_| feed(&zeros, 1));
        (0..20).for_each(|_| feed(&zeros, 900));
    }
}
