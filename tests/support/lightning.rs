//! One call of Lightning Attention with its definition beside it.
#![allow(dead_code)] // every test program uses its own part of it

use crate::support::{normal, widen};
use linattn::Runtime;
use linattn::attention::State;
use linattn::attention::lightning::{LightningAttention, naive};
use linattn::tensor::{Element, Rng, View, ViewMut};

/// Arguments of a call; tensors are contiguous `[batch, len, heads, dim]`.
#[derive(Clone, Debug)]
pub struct Problem {
    pub batch: usize,
    pub len: usize,
    pub dk: usize,
    pub dv: usize,
    /// One per head.
    pub slopes: Vec<f64>,
    /// The hint, or the library's own choice.
    pub chunk: Option<usize>,
    pub scale: f32,
    pub q: Vec<f32>,
    pub k: Vec<f32>,
    pub v: Vec<f32>,
    /// `[batch, heads, dk, dv]` before the first token.
    pub state: Vec<f32>,
}

impl Problem {
    /// Random tensors. `dims` is `[batch, len, dk, dv]`.
    pub fn new(dims: [usize; 4], slopes: &[f64], seed: u64) -> Self {
        let [batch, len, dk, dv] = dims;
        let (mut rng, heads) = (Rng::new(seed), slopes.len());
        let rows = batch * len * heads;
        Self {
            batch,
            len,
            dk,
            dv,
            slopes: slopes.to_vec(),
            chunk: None,
            scale: 1.0,
            q: normal(&mut rng, rows * dk),
            k: normal(&mut rng, rows * dk),
            v: normal(&mut rng, rows * dv),
            state: normal(&mut rng, batch * heads * dk * dv),
        }
    }

    pub fn heads(&self) -> usize {
        self.slopes.len()
    }

    /// Shape of `q` and `k`.
    pub fn qk(&self) -> [usize; 4] {
        [self.batch, self.len, self.heads(), self.dk]
    }

    /// Shape of `v` and the output.
    pub fn vo(&self) -> [usize; 4] {
        [self.batch, self.len, self.heads(), self.dv]
    }

    /// The first tokens of a call with one batch row.
    pub fn start_of(&self, len: usize) -> Self {
        assert_eq!(self.batch, 1, "batch rows");
        let first = |x: &[f32], d: usize| x[..len * self.heads() * d].to_vec();
        Self {
            len,
            q: first(&self.q, self.dk),
            k: first(&self.k, self.dk),
            v: first(&self.v, self.dv),
            ..self.clone()
        }
    }

    pub fn op(&self) -> LightningAttention {
        let op = match self.chunk {
            Some(chunk) => LightningAttention::with_chunk(&self.slopes, chunk),
            None => LightningAttention::new(&self.slopes),
        };
        let op = op.and_then(|op| op.with_scale(self.scale));
        op.expect("slopes and scale in their domain")
    }

    pub fn start(&self) -> State {
        let shape = [self.batch, self.heads(), self.dk, self.dv];
        State::from_slice(&self.state, shape, 0).expect("a state")
    }

    /// Output and final state of one call.
    pub fn run(&self, rt: &Runtime) -> (Vec<f32>, Vec<f32>) {
        self.run_parts(rt, &[self.len])
    }

    /// Output and final state when the sequence is fed in parts of these lengths.
    pub fn run_parts(&self, rt: &Runtime, parts: &[usize]) -> (Vec<f32>, Vec<f32>) {
        let (op, mut state) = (self.op(), self.start());
        let mut out = vec![f32::NAN; self.v.len()];
        let [q, k] = [&self.q, &self.k].map(|x| View::new(x, self.qk()).expect("a tensor"));
        let v = View::new(&self.v, self.vo()).expect("a tensor");
        let mut at = 0;
        for n in parts {
            let [q, k, v] = [q, k, v].map(|x| x.slice(1, at, at + n));
            let out = ViewMut::new(&mut out, self.vo()).expect("a tensor");
            let out = out.slice(1, at, at + n);
            op.forward(rt, q, k, v, out, &mut state).expect("a good call");
            at += n;
        }
        assert_eq!((at, state.len()), (self.len, self.len), "tokens");
        (out, contents(&state))
    }

    /// As [`run`](Self::run) with tensors of another element type.
    pub fn run_as<E: Element>(&self, rt: &Runtime) -> (Vec<f32>, Vec<f32>) {
        let narrow = |x: &[f32]| x.iter().map(|x| E::from_f32(*x)).collect::<Vec<E>>();
        let [q, k, v] = [&self.q, &self.k, &self.v].map(|x| narrow(x));
        let (mut out, mut state) = (vec![E::from_f32(f32::NAN); v.len()], self.start());
        self.op()
            .forward(
                rt,
                View::new(&q, self.qk()).expect("a tensor"),
                View::new(&k, self.qk()).expect("a tensor"),
                View::new(&v, self.vo()).expect("a tensor"),
                ViewMut::new(&mut out, self.vo()).expect("a tensor"),
                &mut state,
            )
            .expect("a good call");
        let out = out.into_iter().map(E::to_f32).collect();
        (out, contents(&state))
    }

    /// The same call with tensors rounded to another element type.
    pub fn rounded<E: Element>(&self) -> Self {
        let round = |x: &[f32]| x.iter().map(|x| E::from_f32(*x).to_f32()).collect();
        let mut p = self.clone();
        (p.q, p.k, p.v) = (round(&self.q), round(&self.k), round(&self.v));
        p
    }

    /// Output and final state by definition.
    pub fn naive(&self) -> (Vec<f64>, Vec<f64>) {
        let (h_all, dv) = (self.heads(), self.dv);
        let mut out = vec![0.0; self.v.len()];
        let mut states = widen(&self.state);
        for b in 0..self.batch {
            for h in 0..h_all {
                let rows = |x: &[f32], d: usize| -> Vec<f64> {
                    let at = |t| ((b * self.len + t) * h_all + h) * d;
                    let row = |t| x[at(t)..at(t) + d].iter().copied().map(f64::from);
                    (0..self.len).flat_map(row).collect()
                };
                let (q, k, v) = (rows(&self.q, self.dk), rows(&self.k, self.dk), rows(&self.v, dv));
                let size = self.dk * dv;
                let state = &mut states[(b * h_all + h) * size..][..size];
                let (slope, scale) = (self.slopes[h], f64::from(self.scale));
                let y = naive::head(&q, &k, &v, [self.dk, dv], slope, scale, state);
                for t in 0..self.len {
                    let at = ((b * self.len + t) * h_all + h) * dv;
                    out[at..at + dv].copy_from_slice(&y[t * dv..][..dv]);
                }
            }
        }
        (out, states)
    }
}

/// All numbers of a state.
pub fn contents(state: &State) -> Vec<f32> {
    state.view().as_slice().expect("a whole state").to_vec()
}
