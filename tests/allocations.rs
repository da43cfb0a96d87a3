//! Decoding, and classifying and what it is made of, allocate nothing once the shapes are known. A program without test
//! harness: the counter sees all threads, and a harness has some of its own.

use linattn::attention::agent::{AgentAttention, AgentExtra};
use linattn::attention::focused::{FocusedConfig, FocusedLinearAttention};
use linattn::layers::{DepthwiseConfig, DepthwiseConv2d, Resample};
use linattn::models::{
    Architecture, Decoder, FlashLmConfig, Sampler, SamplerConfig, TransNormerConfig, VisionConfig,
    VisionTransformer,
};
use linattn::tensor::{Tensor, View, ViewMut};
use linattn::{Result, Runtime};
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

struct Counting;

static CALLS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: everything is passed on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        CALLS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(ptr, layout) }
    }
    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        CALLS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { System.realloc(ptr, layout, size) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// Allocations of `steps` decode steps after a prompt and one step.
fn decode(rt: &Runtime, config: impl Architecture, batch: usize, steps: usize) -> usize {
    let model = Decoder::random(config, 1).expect("a model");
    let vocab = model.vocab_size();
    let mut state = model.new_state(batch).expect("a state");
    let mut logits = vec![0.0; batch * vocab];
    let prompt: Vec<u32> = (0..batch * 40).map(|t| (t % vocab) as u32).collect();
    model.prefill(rt, &prompt, &mut state, &mut logits).expect("a prompt");
    let config = SamplerConfig { top_k: 20, top_p: 0.9, ..SamplerConfig::default() };
    let mut sampler = Sampler::new(config).expect("a sampler");
    let mut tokens = vec![0; batch];
    let mut before = 0;
    for step in 0..=steps {
        if step == 1 {
            before = CALLS.load(Ordering::Relaxed);
        }
        for (token, row) in tokens.iter_mut().zip(logits.chunks_exact(vocab)) {
            *token = sampler.sample(row).expect("a token");
        }
        model.decode_step(rt, &tokens, &mut state, &mut logits).expect("a step");
    }
    CALLS.load(Ordering::Relaxed) - before
}

/// Allocations of operations on a map of `side * side` tokens, after one round of them.
fn vision(rt: &Runtime, side: usize) -> Result<usize> {
    let (heads, dim, n, bins) = (2, 16, side * side, 3);
    let (q, mut out) = (Tensor::zeros([1, n, heads, dim])?, Tensor::zeros([1, n, heads, dim])?);
    let mut agents = Tensor::<4>::zeros([1, bins * bins, heads, dim])?;
    let (bias, mask) = (Tensor::<3>::zeros([heads, bins * bins, n])?, vec![true; n]);
    let pool = Resample::average([side; 2], [bins; 2])?;
    let kernel = Tensor::<4>::zeros([heads * dim, 1, 3, 3])?;
    let conv = DepthwiseConv2d::new(kernel.view(), None, DepthwiseConfig::same(3))?;
    let config = FocusedConfig { heads, ..FocusedConfig::default() };
    let focused = FocusedLinearAttention::new(config, &vec![0.0; heads * dim])?;
    let mut before = 0;
    for round in 0..4 {
        if round == 1 {
            before = CALLS.load(Ordering::Relaxed);
        }
        let map = View::new(q.as_slice(), [1, side, side, heads * dim])?;
        let (q, tokens) = (q.view(), [1, n, heads * dim]);
        let shape = [1, bins, bins, heads * dim];
        let means = ViewMut::new(agents.as_mut_slice(), shape)?;
        pool.forward(rt, map, means)?;
        let extra = AgentExtra {
            agent_bias: Some(bias.view()),
            key_mask: Some(View::new(&mask, [1, n])?),
            ..AgentExtra::default()
        };
        AgentAttention::new().forward_with(rt, q, q, q, agents.view(), out.view_mut(), extra)?;
        let to = ViewMut::new(out.as_mut_slice(), tokens)?;
        conv.accumulate(rt, map, to.split_rows([side; 2])?)?;
        focused.forward(rt, q, q, q, out.view_mut())?;
    }
    Ok(CALLS.load(Ordering::Relaxed) - before)
}

/// Allocations of `times` classifications after a few of the same image.
fn classify(rt: &Runtime, config: VisionConfig, times: usize) -> usize {
    let model = VisionTransformer::random(config, 1).expect("a model");
    let [channels, h, w] = model.image();
    let image = vec![0.5; channels * h * w];
    let mut logits = vec![0.0; model.classes()];
    let mut run = || {
        let image = View::new(&image, [1, channels, h, w]).expect("an image");
        let out = ViewMut::new(&mut logits, [1, model.classes()]).expect("logits");
        model.forward(rt, image, out).expect("logits");
    };
    for _ in 0..3 {
        run();
    }
    let before = CALLS.load(Ordering::Relaxed);
    for _ in 0..times {
        run();
    }
    CALLS.load(Ordering::Relaxed) - before
}

fn main() {
    let small = || TransNormerConfig::sized(64, 32, 2, 4, 48);
    let rt = Runtime::builder().threads(1).build().expect("a runtime");
    assert_eq!(decode(&rt, small(), 1, 10_000), 0, "one sequence");
    assert_eq!(decode(&rt, small(), 5, 1_000), 0, "five sequences");
    // More steps than a chunk has rows: it is added up and begun again.
    let flash = FlashLmConfig { group_size: 16, ..FlashLmConfig::sized(64, 32, 2) };
    assert_eq!(decode(&rt, flash, 2, 500), 0, "chunks");
    assert_eq!(vision(&rt, 40).expect("good calls"), 0, "maps");
    for name in ["agent_deit_t", "flatten_deit_t", "deit_t", "agent_swin_t"] {
        let config = VisionConfig::named(name).expect("a published name").with_image(64);
        assert_eq!(classify(&rt, config, 5), 0, "{name}");
    }
    #[cfg(feature = "parallel")]
    {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().expect("a pool");
        let rt = Runtime::builder().threads(3).build().expect("a runtime");
        let large = TransNormerConfig::sized(3000, 512, 2, 8, 1408);
        let calls = pool.install(|| decode(&rt, large, 2, 50));
        assert_eq!(calls, 0, "three threads");
    }
    println!("nothing was allocated: ok");
}
