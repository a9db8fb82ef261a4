//! The frequencies of rotary position embeddings, and the ways of stretching them to longer contexts.

use crate::config::Settings;
use crate::load::LoadError;
use std::f32::consts::PI;

/// How frequencies are stretched.
#[derive(Clone, PartialEq, Debug)]
pub(crate) enum Scaling {
    /// Not at all.
    None,
    /// All by one factor.
    Linear { factor: f32 },
    /// Low ones by a factor, high ones not, those between partly (Llama 3.1).
    Llama3 { factor: f32, low: f32, high: f32, original: f32 },
    /// As Llama 3 by number of rotations, with a correction of the attention's temperature.
    Yarn { factor: f32, original: f32, fast: f32, slow: f32, truncate: bool, attention: f32 },
}

/// The position embedding of a model.
#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Rope {
    pub(crate) theta: f32,
    pub(crate) scaling: Scaling,
}

impl Rope {
    /// Reads `rope_parameters`, or the older `rope_theta` with `rope_scaling`.
    pub(crate) fn read(config: &Settings<'_>, max_positions: u32) -> Result<Rope, LoadError> {
        let newer = config.object("rope_parameters")?;
        let parameters = match &newer {
            Some(parameters) => Some(parameters.clone()),
            None => config.object("rope_scaling")?,
        };
        let theta = match newer.as_ref().map(|p| p.number("rope_theta")).transpose()?.flatten() {
            Some(theta) => theta,
            None => config.number("rope_theta")?.unwrap_or(10_000.0),
        };
        if !(1.0..=1e12).contains(&theta) {
            return Err(LoadError::field("rope_theta", theta, "from 1 to 1e12"));
        }
        let scaling = match &parameters {
            Some(parameters) => Scaling::read(parameters, config, max_positions)?,
            None => Scaling::None,
        };
        Ok(Rope { theta, scaling })
    }

    /// Half a head's frequencies, and what cosines and sines are multiplied by.
    pub(crate) fn frequencies(&self, head_dim: usize) -> (Vec<f32>, f32) {
        // In f32 from the start, as the models were trained.
        let powers: Vec<f32> =
            (0..head_dim / 2).map(|i| self.theta.powf((2 * i) as f32 / head_dim as f32)).collect();
        let plain = powers.iter().map(|p| 1.0 / p);
        match self.scaling {
            Scaling::None => (plain.collect(), 1.0),
            Scaling::Linear { factor } => (plain.map(|f| f / factor).collect(), 1.0),
            Scaling::Llama3 { factor, low, high, original } => {
                let stretch = |f: f32| {
                    let wavelength = 2.0 * PI / f;
                    if wavelength < original / high {
                        f
                    } else if wavelength > original / low {
                        f / factor
                    } else {
                        let smooth = (original / wavelength - low) / (high - low);
                        (1.0 - smooth) * (f / factor) + smooth * f
                    }
                };
                (plain.map(stretch).collect(), 1.0)
            }
            Scaling::Yarn { factor, original, fast, slow, truncate, attention } => {
                let dim = head_dim as f32;
                // The dimension that turns so many times within the original context.
                let turning =
                    |rotations: f32| dim * (original / (rotations * 2.0 * PI)).ln() / (2.0 * self.theta.ln());
                let (mut low, mut high) = (turning(fast), turning(slow));
                if truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                (low, high) = (low.max(0.0), high.min(dim - 1.0));
                if low == high {
                    high += 0.001;
                }
                let mix = |(i, power): (usize, &f32)| {
                    let stretched = ((i as f32 - low) / (high - low)).clamp(0.0, 1.0);
                    let keep = 1.0 - stretched;
                    1.0 / (factor * power) * (1.0 - keep) + 1.0 / power * keep
                };
                (powers.iter().enumerate().map(mix).collect(), attention)
            }
        }
    }
}

impl Scaling {
    fn read(
        parameters: &Settings<'_>,
        config: &Settings<'_>,
        max_positions: u32,
    ) -> Result<Scaling, LoadError> {
        let kind = match parameters.text("rope_type")? {
            Some(kind) => Some(kind),
            None => parameters.text("type")?,
        };
        let factor = || parameters.required_number("factor", 1.0..=1e6);
        match kind.as_deref() {
            None | Some("default") => {
                // Without a type, anything but the base would be silently ignored.
                if kind.is_none() && parameters.has("factor") {
                    return Err(LoadError::field(
                        parameters.path("rope_type"),
                        "missing",
                        "given beside factor",
                    ));
                }
                match parameters.nested() {
                    Some(name) => {
                        let field = parameters.path(&name);
                        Err(LoadError::unsupported(
                            field,
                            "an object",
                            "one set of parameters for all layers",
                        ))
                    }
                    None => Ok(Scaling::None),
                }
            }
            Some("linear") => Ok(Scaling::Linear { factor: factor()? }),
            Some("llama3") => {
                let scaling = Scaling::Llama3 {
                    factor: factor()?,
                    low: parameters.required_number("low_freq_factor", 1e-3..=1e6)?,
                    high: parameters.required_number("high_freq_factor", 1e-3..=1e6)?,
                    original: parameters.required_number("original_max_position_embeddings", 1.0..=1e9)?,
                };
                match scaling {
                    Scaling::Llama3 { low, high, .. } if low >= high => {
                        let field = parameters.path("high_freq_factor");
                        Err(LoadError::field(
                            field,
                            high,
                            format_args!("greater than low_freq_factor, {low}"),
                        ))
                    }
                    scaling => Ok(scaling),
                }
            }
            Some("yarn") => Scaling::read_yarn(parameters, config, max_positions),
            Some(other) => Err(LoadError::unsupported(
                parameters.path("rope_type"),
                other,
                "default, linear, llama3, yarn",
            )),
        }
    }

    fn read_yarn(
        parameters: &Settings<'_>,
        config: &Settings<'_>,
        max_positions: u32,
    ) -> Result<Scaling, LoadError> {
        let original = match parameters.number("original_max_position_embeddings")? {
            Some(original) => Some(original),
            None => config.number("original_max_position_embeddings")?,
        };
        let original = original.unwrap_or(max_positions as f32);
        if !(1.0..=1e9).contains(&original) {
            let field = parameters.path("original_max_position_embeddings");
            return Err(LoadError::field(field, original, "from 1 to 1e9"));
        }
        let factor = parameters.required_number("factor", 1.0..=1e6)?;
        let temperature = |m: f32| if factor <= 1.0 { 1.0 } else { 0.1 * m * factor.ln() + 1.0 };
        let scales = (parameters.number("mscale")?, parameters.number("mscale_all_dim")?);
        let attention = match (parameters.number("attention_factor")?, scales) {
            (Some(attention), _) => attention,
            (None, (Some(m), Some(all))) if m != 0.0 && all != 0.0 => temperature(m) / temperature(all),
            (None, _) => temperature(1.0),
        };
        if !(1e-3..=1e3).contains(&attention) {
            return Err(LoadError::field(
                parameters.path("attention_factor"),
                attention,
                "from 0.001 to 1000",
            ));
        }
        let or = |value: Option<f32>, default: f32| value.filter(|v| *v > 0.0).unwrap_or(default);
        Ok(Scaling::Yarn {
            factor,
            original,
            fast: or(parameters.number("beta_fast")?, 32.0),
            slow: or(parameters.number("beta_slow")?, 1.0),
            truncate: parameters.flag("truncate")?.unwrap_or(true),
            attention,
        })
    }
}
