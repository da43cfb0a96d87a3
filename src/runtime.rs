//! How work is run: instruction set, precision, threads and scratch memory, passed explicitly to every call.

#[cfg(feature = "std")]
use crate::error::Error;
use crate::error::Result;
use crate::scratch::{Block, Cut, bytes_of};
use crate::simd::{Backend, Isa, Task, backend};
use core::fmt;

/// What accuracy the caller permits. A permission, not a demand: where an engine is missing, `F32` runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Precision {
    /// Products in single precision.
    #[default]
    F32,
    /// Products of operands split into two `bf16` parts: the accuracy class of `F32` on matrix units.
    Bf16x3,
    /// Products of operands rounded to `bf16`.
    Bf16,
}

impl Precision {
    fn finer(self) -> Self {
        match self {
            Precision::Bf16 => Precision::Bf16x3,
            Precision::F32 | Precision::Bf16x3 => Precision::F32,
        }
    }
}

/// The one choice of code path, made when the runtime is built.
#[derive(Clone, Copy, Debug)]
enum Engine {
    Portable(backend::Portable),
    #[cfg(target_arch = "x86_64")]
    Avx2(backend::Avx2),
    #[cfg(all(target_arch = "x86_64", feature = "avx512"))]
    Avx512(backend::Avx512),
    #[cfg(all(target_arch = "x86_64", feature = "amx"))]
    AmxBf16x3(backend::AmxBf16x3),
    #[cfg(all(target_arch = "x86_64", feature = "amx"))]
    AmxBf16(backend::AmxBf16),
    #[cfg(target_arch = "aarch64")]
    Neon(backend::Neon),
}

/// A line of [`ENGINES`].
struct Choice {
    /// The instruction set it needs.
    isa: Isa,
    /// The precision whose permission it needs.
    precision: Precision,
    detect: fn() -> Option<Engine>,
}

/// What can run, best first: the first line that permission, cap and machine allow.
const ENGINES: &[Choice] = &[
    #[cfg(all(target_arch = "x86_64", feature = "amx"))]
    Choice {
        isa: Isa::Amx,
        precision: Precision::Bf16,
        detect: || backend::AmxBf16::detect().map(Engine::AmxBf16),
    },
    #[cfg(all(target_arch = "x86_64", feature = "amx"))]
    Choice {
        isa: Isa::Amx,
        precision: Precision::Bf16x3,
        detect: || backend::AmxBf16x3::detect().map(Engine::AmxBf16x3),
    },
    #[cfg(all(target_arch = "x86_64", feature = "avx512"))]
    Choice {
        isa: Isa::Avx512,
        precision: Precision::F32,
        detect: || backend::Avx512::detect().map(Engine::Avx512),
    },
    #[cfg(target_arch = "x86_64")]
    Choice {
        isa: Isa::Avx2,
        precision: Precision::F32,
        detect: || backend::Avx2::detect().map(Engine::Avx2),
    },
    #[cfg(target_arch = "aarch64")]
    Choice {
        isa: Isa::Neon,
        precision: Precision::F32,
        detect: || backend::Neon::detect().map(Engine::Neon),
    },
    Choice {
        isa: Isa::Portable,
        precision: Precision::F32,
        detect: || Some(Engine::Portable(backend::Portable)),
    },
];

impl Engine {
    /// The best engine within `cap` that `precision` permits.
    fn best(cap: Isa, precision: Precision) -> Option<Self> {
        let permitted = |p| p == Precision::F32 || p == precision;
        let fits = |c: &&Choice| c.isa <= cap && permitted(c.precision);
        ENGINES.iter().filter(fits).find_map(|c| (c.detect)())
    }
}

/// Instruction set, precision, threads and scratch memory.
///
/// Cheap to keep, meant to be built once and shared by reference. Threads are those of the rayon pool that the
/// caller is in; without the feature `parallel` everything runs on the calling thread.
///
/// ```
/// use linattn::{Isa, Runtime};
/// let rt = Runtime::new()?; // the best this machine has, as LINATTN_ISA and LINATTN_NUM_THREADS allow
/// println!("{rt:?}");
/// let plain = Runtime::builder().isa(Isa::Portable).threads(1).build()?;
/// assert_eq!(plain.isa(), Isa::Portable);
/// # Ok::<(), linattn::Error>(())
/// ```
pub struct Runtime {
    engine: Engine,
    precision: Precision,
    /// What runs with a precision that rounds less.
    finer: Engine,
    threads: Option<usize>,
    #[cfg(feature = "std")]
    blocks: crate::scratch::Pool,
}

/// Settings of a [`Runtime`].
#[derive(Clone, Debug, Default)]
pub struct Builder {
    isa: Option<Isa>,
    precision: Precision,
    threads: Option<usize>,
}

impl Builder {
    /// Demands an instruction set: [`Error::Isa`] at [`build`](Self::build) if the machine lacks it. The
    /// environment is not consulted then.
    #[must_use]
    pub fn isa(mut self, isa: Isa) -> Self {
        self.isa = Some(isa);
        self
    }

    /// Permits a precision.
    #[must_use]
    pub fn precision(mut self, precision: Precision) -> Self {
        self.precision = precision;
        self
    }

    /// Splits work into at most this many parts (at least one). Results do not depend on it.
    #[must_use]
    pub fn threads(mut self, threads: usize) -> Self {
        self.threads = Some(threads.max(1));
        self
    }

    /// Checks the settings against machine and environment.
    pub fn build(self) -> Result<Runtime> {
        let isa = match self.isa {
            Some(isa) => isa,
            None => env_isa()?.unwrap_or_else(Isa::best),
        };
        let engine = |precision| match isa.available() {
            true => Engine::best(isa, precision),
            false => None,
        };
        let refuse = || Isa::refuse(isa.name());
        Ok(Runtime {
            engine: engine(self.precision).ok_or_else(refuse)?,
            precision: self.precision,
            finer: engine(self.precision.finer()).ok_or_else(refuse)?,
            threads: match self.threads {
                Some(n) => Some(n),
                None => env_threads()?,
            },
            #[cfg(feature = "std")]
            blocks: crate::scratch::Pool::default(),
        })
    }
}

#[cfg(feature = "std")]
fn env_isa() -> Result<Option<Isa>> {
    match std::env::var("LINATTN_ISA") {
        Ok(name) if !name.is_empty() => Isa::parse(&name).map(Some),
        _ => Ok(None),
    }
}

#[cfg(feature = "std")]
fn env_threads() -> Result<Option<usize>> {
    match std::env::var("LINATTN_NUM_THREADS") {
        Ok(n) if !n.is_empty() => match n.parse() {
            Ok(n) if n >= 1 => Ok(Some(n)),
            _ => Err(Error::value("runtime", "LINATTN_NUM_THREADS", "a number of at least 1", n)),
        },
        _ => Ok(None),
    }
}

#[cfg(not(feature = "std"))]
fn env_isa() -> Result<Option<Isa>> {
    Ok(None)
}

#[cfg(not(feature = "std"))]
fn env_threads() -> Result<Option<usize>> {
    Ok(None)
}

/// Work that can be divided between threads.
pub(crate) trait Divide: Send + Sized {
    /// How many indivisible units it has.
    fn units(&self) -> usize;
    /// How much work it is.
    fn flops(&self) -> usize;
    /// The first `mid` units, and the rest.
    fn split(self, mid: usize) -> (Self, Self);
}

/// Work below this is not worth a second thread: waking one takes some microseconds.
const WORTH_A_THREAD: usize = 1 << 20;

impl Runtime {
    /// The best instruction set of this machine, `F32`, the current rayon pool; `LINATTN_ISA` and
    /// `LINATTN_NUM_THREADS` may ask for less.
    pub fn new() -> Result<Self> {
        Self::builder().build()
    }

    /// Settings to choose from.
    #[must_use]
    pub fn builder() -> Builder {
        Builder::default()
    }

    /// The instruction set in use.
    #[must_use]
    pub fn isa(&self) -> Isa {
        struct Ask;
        impl Task for Ask {
            type Output = Isa;
            fn run<B: Backend>(self, _: B) -> Isa {
                B::ISA
            }
        }
        self.run(Ask)
    }

    /// The precision that was permitted.
    #[must_use]
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// A runtime of the same threads and memory for products whose errors grow in what follows, with the next precision
    /// that rounds less.
    pub(crate) fn finer(&self) -> Self {
        Self {
            engine: self.finer,
            precision: self.precision.finer(),
            finer: self.finer,
            threads: self.threads,
            #[cfg(feature = "std")]
            blocks: self.blocks.clone(),
        }
    }

    /// The matrix engine that really runs: `f32`, `bf16x3` or `bf16`.
    #[must_use]
    pub fn engine(&self) -> &'static str {
        struct Ask;
        impl Task for Ask {
            type Output = &'static str;
            fn run<B: Backend>(self, _: B) -> &'static str {
                <B::T as crate::simd::Tiles>::NAME
            }
        }
        self.run(Ask)
    }

    /// The fixed printable name of the code path, such as `x86_64-f32-avx512-12x32`.
    #[must_use]
    pub fn kernel(&self) -> &'static str {
        struct Ask;
        impl Task for Ask {
            type Output = &'static str;
            fn run<B: Backend>(self, _: B) -> &'static str {
                B::NAME
            }
        }
        self.run(Ask)
    }

    /// How many parts work is split into at most.
    #[must_use]
    pub fn threads(&self) -> usize {
        #[cfg(feature = "parallel")]
        let pool = rayon::current_num_threads;
        #[cfg(not(feature = "parallel"))]
        let pool = || 1;
        self.threads.unwrap_or_else(pool)
    }

    /// Runs `task` on the backend of this runtime: the only place where a code path is chosen.
    pub fn run<T: Task>(&self, task: T) -> T::Output {
        match self.engine {
            Engine::Portable(b) => task.run(b),
            #[cfg(target_arch = "x86_64")]
            Engine::Avx2(b) => task.run(b),
            #[cfg(all(target_arch = "x86_64", feature = "avx512"))]
            Engine::Avx512(b) => task.run(b),
            #[cfg(all(target_arch = "x86_64", feature = "amx"))]
            Engine::AmxBf16x3(b) => task.run(b),
            #[cfg(all(target_arch = "x86_64", feature = "amx"))]
            Engine::AmxBf16(b) => task.run(b),
            #[cfg(target_arch = "aarch64")]
            Engine::Neon(b) => task.run(b),
        }
    }

    /// Divides `job` into at most [`threads`](Self::threads) parts of nearly equal size and runs `work` on each,
    /// with `bytes` of scratch. All memory is had before anything runs.
    pub(crate) fn divide<J: Divide>(
        &self,
        job: J,
        bytes: usize,
        work: &(impl Fn(J, Cut<'_>) + Sync),
    ) -> Result<()> {
        let parts = self.parts(&job);
        let bytes = bytes_of::<u8>(bytes);
        self.with_scratch(parts * bytes, |cut| divide(job, parts, cut, bytes, work))
    }

    /// As [`divide`](Self::divide) with scratch that the caller has: [`threads`](Self::threads) times `bytes`,
    /// rounded up to cache lines.
    pub(crate) fn divide_in<J: Divide>(
        &self,
        job: J,
        cut: Cut<'_>,
        bytes: usize,
        work: &(impl Fn(J, Cut<'_>) + Sync),
    ) {
        let parts = self.parts(&job);
        divide(job, parts, cut, bytes_of::<u8>(bytes), work);
    }

    /// Runs `work` inside of the thread pool, so that the many small divisions in it need not go there one by
    /// one.
    pub(crate) fn enter<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        #[cfg(feature = "parallel")]
        if self.threads() > 1 && rayon::current_thread_index().is_none() {
            return rayon::join(work, || ()).0;
        }
        work()
    }

    /// How many parts `job` is worth.
    fn parts<J: Divide>(&self, job: &J) -> usize {
        let worth = (job.flops() / WORTH_A_THREAD).max(1);
        self.threads().min(worth).min(job.units()).max(1)
    }

    /// `bytes` of scratch memory for `work`, kept for later calls.
    pub(crate) fn with_scratch<R>(
        &self,
        bytes: usize,
        work: impl FnOnce(Cut<'_>) -> R,
    ) -> Result<R> {
        let mut block = self.take_block(bytes);
        block.grow(bytes)?;
        let out = work(block.cut());
        self.keep_block(block);
        Ok(out)
    }

    #[cfg(feature = "std")]
    fn take_block(&self, bytes: usize) -> Block {
        self.blocks.take(bytes)
    }

    #[cfg(feature = "std")]
    fn keep_block(&self, block: Block) {
        self.blocks.keep(block);
    }

    /// `len` floats of whatever values, kept for later calls once they are dropped.
    #[cfg(feature = "candle")]
    pub(crate) fn floats(&self, len: usize) -> Result<crate::scratch::Floats> {
        self.blocks.floats(len)
    }

    #[cfg(not(feature = "std"))]
    fn take_block(&self, _: usize) -> Block {
        Block::new()
    }

    #[cfg(not(feature = "std"))]
    fn keep_block(&self, _: Block) {}
}

/// Runs `work` on `parts` (at most `job.units()`) pieces of `job`, each with `bytes` cut off `scratch`.
/// Pieces depend on the number of parts only; what crosses pieces is not this function's business.
pub(crate) fn divide<J: Divide>(
    job: J,
    parts: usize,
    mut scratch: Cut<'_>,
    bytes: usize,
    work: &(impl Fn(J, Cut<'_>) + Sync),
) {
    let parts = parts.min(job.units());
    if parts <= 1 {
        return work(job, scratch);
    }
    let left = parts / 2;
    let mid = job.units() * left / parts;
    let (a, b) = job.split(mid);
    let near = Cut::new(scratch.take(left * bytes));
    let (near, far) =
        (|| divide(a, left, near, bytes, work), || divide(b, parts - left, scratch, bytes, work));
    #[cfg(feature = "parallel")]
    rayon::join(near, far);
    #[cfg(not(feature = "parallel"))]
    (near(), far());
}

impl fmt::Debug for Runtime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Runtime")
            .field("kernel", &self.kernel())
            .field("precision", &self.precision)
            .field("threads", &self.threads())
            .finish_non_exhaustive()
    }
}
