//! Maps cut into windows, after a cyclic shift.

use crate::runtime::{Divide, Runtime};
use crate::scratch::Cut;
use crate::tensor::{View, ViewMut};

/// How a map is cut: window after window in row-major order, row-major inside.
#[derive(Clone, Copy, Debug)]
pub(super) struct Windows {
    pub map: [usize; 2],
    pub window: [usize; 2],
    pub shift: [usize; 2],
}

impl Windows {
    /// Whether tokens of a window follow each other in the map already.
    pub fn in_order(&self) -> bool {
        self.shift == [0; 2] && self.window[1] == self.map[1]
    }

    /// Rows and columns of windows.
    pub fn grid(&self) -> [usize; 2] {
        [self.map[0] / self.window[0], self.map[1] / self.window[1]]
    }

    /// Copies the tokens of a map (`[batch, tokens, width]`) into windows (`[windows of all batches, tokens,
    /// width]`).
    pub fn gather(self, rt: &Runtime, map: View<'_, f32, 3>, dst: ViewMut<'_, f32, 3>) {
        let job = Gather { windows: self, map, first: 0, dst };
        rt.divide_in(job, Cut::new(&mut []), 0, &|job: Gather<'_>, _: Cut<'_>| job.run());
    }

    /// Copies windows back to the map.
    pub fn scatter(self, src: View<'_, f32, 3>, mut map: ViewMut<'_, f32, 3>) {
        for w in 0..src.shape()[0] {
            self.each(w, |t, batch, token| {
                map.row_mut([batch, token, 0]).copy_from_slice(src.row([w, t, 0]));
            });
        }
    }

    /// Calls `f` with every token of window `w`, and where it lies: batch row and token of the map.
    fn each(&self, w: usize, mut f: impl FnMut(usize, usize, usize)) {
        let [rows, cols] = self.grid();
        let (batch, at) = (w / (rows * cols), w % (rows * cols));
        let (top, left) = (at / cols * self.window[0], at % cols * self.window[1]);
        for i in 0..self.window[0] {
            let y = (top + i + self.shift[0]) % self.map[0];
            for j in 0..self.window[1] {
                let x = (left + j + self.shift[1]) % self.map[1];
                f(i * self.window[1] + j, batch, y * self.map[1] + x);
            }
        }
    }
}

/// Some windows to be filled.
struct Gather<'a> {
    windows: Windows,
    map: View<'a, f32, 3>,
    first: usize,
    dst: ViewMut<'a, f32, 3>,
}

impl Divide for Gather<'_> {
    fn units(&self) -> usize {
        self.dst.shape()[0]
    }
    fn flops(&self) -> usize {
        self.dst.shape().iter().fold(1, |a: usize, n| a.saturating_mul(*n))
    }
    fn split(self, mid: usize) -> (Self, Self) {
        let (near, far) = self.dst.split_at(0, mid);
        let second = Gather { first: self.first + mid, dst: far, ..self };
        (Gather { dst: near, ..self }, second)
    }
}

impl Gather<'_> {
    fn run(mut self) {
        for w in 0..self.dst.shape()[0] {
            self.windows.each(self.first + w, |t, batch, token| {
                self.dst.row_mut([w, t, 0]).copy_from_slice(self.map.row([batch, token, 0]));
            });
        }
    }
}
