import Foundation

/// What `edge-stream export-ios` writes beside a model: what the file must be, and how to run it on the phone it is for.
public struct ModelManifest: Codable, Sendable, Equatable {
    public static let fileName = "manifest.json"
    static let format = 1

    public var format: Int
    public var name: String
    /// A file name, not a path.
    public var file: String
    public var bytes: Int64
    /// 64 hexadecimal digits.
    public var sha256: String
    /// Nil: what the model recommends.
    public var contextSize: Int?
    public var sinks: Int?
    /// llama.cpp's names; nil: f16.
    public var keyType: String?
    public var valueType: String?
    /// One of llama.cpp's templates, by name; nil: the model's own.
    public var chatTemplate: String?
    /// The phone that it was made for.
    public var device: String?

    enum CodingKeys: String, CodingKey {
        case format, name, file, bytes, sha256, device
        case contextSize = "n_ctx"
        case sinks = "n_keep"
        case keyType = "cache_type_k"
        case valueType = "cache_type_v"
        case chatTemplate = "chat_template"
    }

    /// Of a file that came without one.
    public init(name: String, file: String, bytes: Int64, sha256: String) {
        format = Self.format
        (self.name, self.file, self.bytes, self.sha256) = (name, file, bytes, sha256)
    }

    public static func read(_ url: URL) throws -> ModelManifest {
        let data: Data
        do {
            data = try Data(contentsOf: url)
        } catch {
            throw ModelStoreError.unreadable(url.lastPathComponent)
        }
        guard let manifest = try? JSONDecoder().decode(ModelManifest.self, from: data) else {
            throw ModelStoreError.noManifest(url.lastPathComponent)
        }
        guard manifest.format <= Self.format else { throw ModelStoreError.newerFormat(manifest.format) }
        let isName = !manifest.file.isEmpty && !manifest.file.hasPrefix(".") && !manifest.file.contains("/")
        let isDigest = manifest.sha256.count == 64 && manifest.sha256.allSatisfy(\.isHexDigit)
        guard isName, isDigest, manifest.bytes > 0, (manifest.contextSize ?? 1) > 0, (manifest.sinks ?? 0) >= 0 else {
            throw ModelStoreError.noManifest(url.lastPathComponent)
        }
        return manifest
    }

    func write(to url: URL) throws {
        let encoder = JSONEncoder()
        encoder.outputFormatting = [.prettyPrinted, .sortedKeys]
        try encoder.encode(self).write(to: url, options: .atomic)
    }
}
