//! The words of tasks that are made from seeds.

/// The first word of a key.
pub const FIRST: [&str; 16] = [
    "amber", "brave", "calm", "dark", "early", "fair", "grand", "happy", "iron", "lazy", "noble", "quiet", "red",
    "silent", "tall", "young",
];

/// The second word of a key.
pub const SECOND: [&str; 24] = [
    "apple", "bear", "bridge", "castle", "cloud", "dragon", "eagle", "forest", "garden", "hammer", "island", "jacket",
    "kitchen", "lantern", "mirror", "needle", "orchard", "pepper", "river", "spider", "tower", "valley", "window",
    "zebra",
];

/// The words of lists.
pub const COMMON: [&str; 48] = [
    "apple", "bread", "chair", "clock", "cloud", "dance", "dream", "earth", "field", "flame", "fruit", "glass",
    "grass", "green", "heart", "horse", "house", "knife", "lemon", "light", "money", "mouse", "music", "night",
    "ocean", "paper", "peach", "piano", "plane", "plant", "queen", "radio", "river", "salad", "sheep", "shirt",
    "smile", "snake", "spoon", "stone", "storm", "sugar", "table", "tiger", "train", "voice", "water", "wheel",
];
