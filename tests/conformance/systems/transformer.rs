//! Transformer blocks.

use super::model::Weights;
use crate::run::Run;
use linattn::Result;
use linattn::layers::WeightFormat;
use linattn::models::TransformerConfig;
use linattn::models::decoder::Maps;
use linattn::tensor::ViewMut;

pub fn block(run: &Run<'_>) -> Result<()> {
    let case = run.case;
    let mut json = case.config.clone();
    // What a block alone has not.
    json["vocab_size"] = 1.into();
    json["layers"] = 1.into();
    let config = TransformerConfig::from_json(&json.to_string())?;
    let block = config.block(&Maps { tensors: &Weights(case), format: WeightFormat::F32 }, "")?;
    let x = case.tensor("in.x");
    let shape @ [batch, len, _] = x.shape();
    let mut y = x.data.clone();
    block.forward(run.rt, ViewMut::new(&mut y, shape)?, None)?;
    run.check("y", &y);
    if !config.causal {
        return Ok(());
    }
    // In parts, and token by token: the same.
    for step in [len, 5, 1] {
        let mut y = x.data.clone();
        let mut state = block.new_state(batch)?;
        for at in (0..len).step_by(step) {
            let part = ViewMut::new(&mut y, shape)?.slice(1, at, len.min(at + step));
            let [b, n, d] = part.shape();
            // Rows of a part of several sequences do not lie the same distance apart.
            let mut rows = vec![0.0; b * n * d];
            let mut part = part;
            for (i, row) in rows.chunks_exact_mut(d).enumerate() {
                row.copy_from_slice(part.row_mut([i / n, i % n, 0]));
            }
            block.forward(run.rt, ViewMut::new(&mut rows, [b, n, d])?, Some(&mut state))?;
            for (i, row) in rows.chunks_exact(d).enumerate() {
                part.row_mut([i / n, i % n, 0]).copy_from_slice(row);
            }
        }
        run.check("y", &y);
    }
    Ok(())
}
