#![no_main]
//! See [`linattn_fuzz::operations::cu_seqlens`]. Borders that are in order are more telling than others: half of them are
//! sorted, or begin and end as they should.

libfuzzer_sys::fuzz_target!(|input: (linattn_fuzz::Call, Vec<u8>, bool, bool)| {
    let (call, borders, sorted, fits) = input;
    let call = linattn_fuzz::small(call);
    let mut borders: Vec<usize> = borders.into_iter().take(20).map(usize::from).collect();
    if sorted {
        borders.sort_unstable();
    }
    if fits {
        borders.retain(|b| *b <= call.len());
        borders.insert(0, 0);
        borders.push(call.len());
    }
    linattn_fuzz::operations::cu_seqlens(call, &borders);
});
