import Foundation

/// A model repository of the Hugging Face hub, and the GGUF files that its API lists.
public struct HubRepository: Sendable, Equatable {
    public let name: String

    /// Offered before anything is typed: sizes that a phone can hold.
    public static let suggested = [
        "mistralai/Ministral-3-3B-Instruct-2512-GGUF", "ggml-org/SmolLM3-3B-GGUF", "ggml-org/gemma-3-1b-it-GGUF",
    ]

    /// `user/repo`, with or without `hf:` or the address before it. Nil for anything else.
    public init?(_ text: String) {
        var rest = text.trimmingCharacters(in: .whitespacesAndNewlines)[...]
        for prefix in ["hf:", "https://huggingface.co/"] where rest.hasPrefix(prefix) {
            rest = rest.dropFirst(prefix.count)
        }
        let parts = rest.split(separator: "/", omittingEmptySubsequences: false)
        let allowed = { (c: Character) in c.isASCII && (c.isLetter || c.isNumber || "-._".contains(c)) }
        guard parts.count == 2, parts.allSatisfy({ !$0.isEmpty && $0.allSatisfy(allowed) && $0.first != "." }) else {
            return nil
        }
        name = String(rest)
    }

    /// Lists files with size and, as all large files have one, SHA-256.
    public var listing: URL { URL(string: "https://huggingface.co/api/models/\(name)/tree/main?recursive=true")! }

    public struct File: Sendable, Equatable, Identifiable {
        public let path: String
        public let manifest: ModelManifest
        public let address: URL

        public var id: String { path }
    }

    /// The models in an answer to `listing`: whole GGUF files with a checksum, smallest first.
    public func files(in answer: Data) throws -> [File] {
        struct Item: Decodable {
            struct LFS: Decodable {
                let oid: String
                let size: Int64
            }
            let path: String
            let lfs: LFS?
        }
        return try JSONDecoder().decode([Item].self, from: answer).compactMap { item -> File? in
            let file = String(item.path.split(separator: "/").last ?? "")
            let lower = file.lowercased()
            guard let lfs = item.lfs, lower.hasSuffix(".gguf"), !lower.contains("mmproj"), !lower.contains("-of-0"),
                let escaped = item.path.addingPercentEncoding(withAllowedCharacters: .urlPathAllowed),
                let address = URL(string: "https://huggingface.co/\(name)/resolve/main/\(escaped)")
            else { return nil }
            let manifest = ModelManifest(
                name: String(file.dropLast(5)), file: file, bytes: lfs.size, sha256: lfs.oid)
            return File(path: item.path, manifest: manifest, address: address)
        }.sorted { ($0.manifest.bytes, $0.path) < ($1.manifest.bytes, $1.path) }
    }
}
